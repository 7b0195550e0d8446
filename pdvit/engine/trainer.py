"""The training loop.

Order of events in one step:
    next batch (augmented and mixed on the device)
    forward pass and objective, backward, part by part
    clip; update, only where loss and gradient are finite; moving average
    only when due: log, evaluate, save
    last: was a stop asked for?
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from rich.console import Console
from torch.amp import GradScaler

from pdvit.config.load import to_dict
from pdvit.config.schema import Config
from pdvit.engine.checkpoint import Checkpoints
from pdvit.engine.distributed import Agreement, Ranks
from pdvit.engine.failures import check_weights, explain, give_up, mark
from pdvit.engine.interrupts import StopRequest
from pdvit.engine.journal import Journal
from pdvit.engine.parallel import make_average, parallelize
from pdvit.engine.profiler import Profiler
from pdvit.engine.protocol import Batch, Task
from pdvit.engine.recipe import check_data, check_recipe
from pdvit.engine.saving import Saver
from pdvit.engine.schedule import make_plan, make_scheduler
from pdvit.engine.state import State
from pdvit.engine.update import Meter, Updater, make_optimizer, skips_on_device
from pdvit.errors import UserError
from pdvit.tracking import RunDirectory, tracker_names

# Skipped steps in a row after which a run stops.
# A float16 run first has to find its loss scale: 65,536, halved each time.
PATIENCE, PATIENCE_FP16 = 5, 25


class Trainer:
    """Trains one task into one run directory."""

    def __init__(self, task: Task, config: Config, device: torch.device, ranks: Ranks) -> None:
        """Prepare everything that can fail before a run directory exists; raises UserError."""
        self.task, self.config, self.device, self.ranks = task, config, device, ranks
        self.plan = make_plan(config, task.steps_per_epoch, task.batch_size)
        average = make_average(task.module, config.optim.ema_decay)
        network = parallelize(task, average, config.run, ranks, device)
        optimizer = make_optimizer(task.module, config.optim)
        self.scheduler = make_scheduler(optimizer, config, self.plan)
        scaler = GradScaler(device.type, enabled=config.run.precision == "fp16")
        self.updater = Updater(task, network, optimizer, scaler, average, config, ranks, device)
        recipe, meter = to_dict(config), Meter(device)
        self.state = State(
            task.module, optimizer, scaler, average, meter, device, ranks, recipe, dict(task.fingerprint)
        )
        self.batch: Batch | None = None
        self.weights = "raw" if average is None else "ema"
        self.evaluated = task.module if average is None else average.module

    def notes(self) -> list[str]:
        """Return what somebody should know before the start."""
        if skips_on_device(self.state.optimizer):
            return []
        return [f"note: {self.config.optim.opt} can't skip a bad step on the device, so every update waits for it once"]

    def restore(self, directory: RunDirectory, changed: Mapping[str, Any]) -> list[str]:
        """Take up a run where its last checkpoint left it, or at its start; return what somebody should know of that.

        `changed` holds the keys that were changed on purpose since the checkpoint, with their values. Raises UserError
        where the checkpoint is damaged, or of other data or another recipe.
        """
        where = str(directory.path)

        def check(facts: dict[str, Any]) -> None:
            check_recipe(facts["config"], self.state.config, changed, where)
            check_data(facts["data"], self.state.data, where)

        self._checkpoints(directory).restore(self.state, check)
        if self.state.progress.step > self.plan.steps:
            raise UserError(
                f"{self.state.progress.step} steps are done already, of {self.plan.steps}",
                "optim.epochs",
                "make the run longer than what is done",
            )
        return self._cut_records(directory)

    def _cut_records(self, directory: RunDirectory) -> list[str]:
        """Drop the records after the checkpoint; a note says so where there are fewer before it than were written."""
        progress = self.state.progress
        written, kept = progress.records, directory.cut_records(progress.step)
        progress.records = kept
        if kept >= written:
            return []
        lost = f"{written} records were written up to step {progress.step}, and {kept} are left"
        return [f"warning: metrics.jsonl was cut short: {lost}; the weights are not affected"]

    def run(self, directory: RunDirectory, console: Console, stop: StopRequest) -> dict[str, Any] | None:
        """Train to the end and return the summary; None where a stop was asked for.

        Raises UserError or RunFailed; the run directory then says `failed`, and can be resumed.
        """
        self.directory, self.checkpoints = directory, self._checkpoints(directory)
        progress, best_metric = self.state.progress, self.task.best_metric
        self.journal = Journal(directory, console, progress, self.plan, best_metric, self.device)
        keep_best = self.config.checkpoint.best
        self.saver = Saver(self.checkpoints, directory.path, self.state, self.plan, self.journal, keep_best)
        self.journal.status("running")
        try:
            with self.journal.display:
                trackers = tracker_names(self.config.run.track) if self.ranks.main else []
                self.journal.open_trackers(trackers, self.state.config)
                done = self._train(stop)
                self.checkpoints.wait()
                return self._finish() if done else None
        except BaseException as error:
            explained = error
            try:
                explained = explain(error, directory.path, self.updater, self.batch)
            finally:
                mark(explained, self.journal, self.checkpoints)
            if explained is error:
                raise
            raise explained from error
        finally:
            self.journal.close()

    def _train(self, stop: StopRequest) -> bool:
        """Run the steps; False where a stop was asked for before the last."""
        plan, state, progress, clock = self.plan, self.state, self.state.progress, self.journal.clock
        agreement = Agreement(self.ranks)
        if progress.step >= plan.steps:
            return True
        profile = Profiler(plan.profile, self.directory.path / "profile", self.ranks)
        with profile as profiler, closing(self.task.batches(progress.step)) as batches:
            clock.enter("data")
            for batch in self._or_save(batches):
                clock.enter("step")
                self.batch = batch
                profiler.enter(progress.step + 1)
                self.scheduler.step_update(progress.step)
                generators = state.generators()
                metrics, skipped = self.updater(batch, progress.step + 1)
                state.meter.add(metrics, skipped)
                progress.step += 1
                progress.samples += self.task.batch_size
                if plan.due(plan.log_every, progress.step):
                    self._log(batch, generators)
                better = plan.due(plan.eval_every, progress.step) and self._evaluate()
                stopping, by_clock = agreement.any(self._should_stop(stop), self.saver.due_by_clock())
                pausing = progress.step == plan.stop_after
                if stopping or pausing or by_clock or self.saver.due(better):
                    self.saver.save(better)
                if pausing:
                    stop.reason = stop.reason or "stop after"
                elif progress.step >= plan.steps:
                    return True
                if stopping or pausing:
                    self._stopped(stop)
                    return False
                clock.enter("data")
        raise AssertionError("a task's batches never end")

    def _or_save(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Hand on the batches; where an image can't be read, save first: everything before it is sound."""
        try:
            yield from batches
        except UserError:
            if self.ranks.world_size == 1 and self.state.progress.step:
                self.saver.save()
            raise

    def _log(self, batch: Batch, generators: dict[str, torch.Tensor]) -> None:
        """Write the means since the last record; stop where one step after another had to be skipped."""
        lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in self.state.optimizer.param_groups)
        means, skipped, in_a_row = self.state.meter.read(self.ranks)
        self.journal.clock.enter("step")  # reading waited for the device, so the clock now has all of its work
        self.state.progress.skipped += skipped
        self.journal.train(means, skipped, float(lr))
        if in_a_row >= (PATIENCE_FP16 if self.updater.scaler.is_enabled() else PATIENCE):
            raise give_up(self.directory.path, self.state, batch, generators, in_a_row)

    def _evaluate(self) -> bool:
        """Measure the held-out images; True where the best number so far came out."""
        progress = self.state.progress
        with self.journal.clock.during("evaluate"):
            check_weights(self.state)
            self.ranks.broadcast_buffers(self.evaluated)
            records, headline = self.task.evaluate(self.evaluated)
        self.journal.evaluation(records, headline)
        value = records["eval"][self.task.best_metric]
        better = math.isfinite(value) and (progress.best is None or value > progress.best)
        if better:
            progress.best, progress.best_step = value, progress.step
        return better

    def _should_stop(self, stop: StopRequest) -> bool:
        if self.plan.time_limit is not None and self.journal.clock.running() >= self.plan.time_limit:
            stop.reason = stop.reason or "time limit"
        return bool(stop)

    def _stopped(self, stop: StopRequest) -> None:
        self.checkpoints.wait()
        self.journal.status("stopped", reason=stop.reason)
        self.ranks.all_gather(None)  # torchrun ends the others as soon as one is done

    def _checkpoints(self, directory: RunDirectory) -> Checkpoints:
        return Checkpoints(directory.path / "checkpoints", self.config.checkpoint.keep, self.plan.milestone)

    def _finish(self) -> dict[str, Any]:
        """Export the weights, measure them, and close the run."""
        progress, tensors = self.state.progress, self.state.snapshot().tensors
        self.ranks.broadcast_buffers(self.evaluated)
        numbers = self.task.finish(self.evaluated, self.weights)
        if self.ranks.main:
            for name, content in self.task.export(tensors.get("ema", tensors["module"]), self.weights).items():
                self.directory.write(name, content)
        summary = {**numbers, "epochs": self.journal.epoch, **progress.summary()}
        self.directory.write_json("summary.json", summary)
        self.journal.status("finished")
        return summary
