"""When a run is saved, and that only sound states are."""

from pathlib import Path

from pdvit.engine.checkpoint import Checkpoints
from pdvit.engine.failures import check_weights
from pdvit.engine.journal import Journal
from pdvit.engine.replay import drop_bundle
from pdvit.engine.schedule import Plan
from pdvit.engine.state import State


class Saver:
    """Saves a run when it is due: by steps, by the clock, at milestones, and after the best evaluation if asked for."""

    def __init__(
        self, checkpoints: Checkpoints, run: Path, state: State, plan: Plan, journal: Journal, best: bool
    ) -> None:
        self.checkpoints, self.run, self.state, self.plan, self.journal = checkpoints, run, state, plan, journal
        self.keeps_best = best
        self.saved, self.owed = 0.0, False

    def due_by_clock(self) -> bool:
        """Tell whether it is time to save by the clock, or to find out that saving came to grief."""
        seconds = self.plan.save_seconds
        by_clock = seconds is not None and self.journal.clock.running() - self.saved >= seconds
        return by_clock or self.checkpoints.failed()

    def due(self, better: bool) -> bool:
        """Tell whether to save after this step, which every process knows; `better`: its evaluation is the best."""
        plan, step = self.plan, self.state.progress.step
        return self.owed or (better and self.keeps_best) or plan.due(plan.save_every, step) or plan.at_milestone(step)

    def save(self, better: bool = False) -> None:
        """Begin to save, unless the last step was skipped; every process takes part.

        Raises RunFailed where weights are broken, and UserError where the save before could not be written.
        """
        self.owed = bool(self.state.meter.in_a_row > 0)
        if self.owed:  # the run may be broken: keep the checkpoint from before, and save when it has recovered
            return
        with self.journal.clock.during("save"):
            check_weights(self.state)
            snapshot = self.state.snapshot()
            if self.state.ranks.main:
                self.checkpoints.save(snapshot, better and self.keeps_best)
                drop_bundle(self.run, snapshot.step)
        self.saved = self.journal.clock.running()
        self.journal.status("running")
