"""Durations of a run in steps, and the learning rate as a function of the step."""

from dataclasses import dataclass

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from pdvit.config.duration import Duration, parse_duration
from pdvit.config.schema import KEYS, Config
from pdvit.errors import UserError


@dataclass(frozen=True)
class StepSchedule:
    """The length of a run and the intervals between its events, in steps unless the name has another unit."""

    total: int
    warmup: int
    log_every: int
    eval_every: int
    save_every: int | None
    per_epoch: int
    save_seconds: float | None = None
    milestone_every: int | None = None
    time_limit_seconds: float | None = None
    stop_after: int | None = None
    """The step after which to stop, even if it is the last: the run can then be made longer."""
    profile: range = range(0)

    def due(self, every: int | None, step: int) -> bool:
        """Return whether an event with this interval is due after `step`; every event is due at the end."""
        return step == self.total or (every is not None and step % every == 0)


def make_step_schedule(config: Config, steps_per_epoch: int, batch_size: int) -> StepSchedule:
    """Convert the configuration's durations to steps; an interval is at least one step.

    Raises UserError if the run has no step or only warm-up, or if it is to stop after its end.
    """

    def read(section: str, name: str) -> Duration | None:
        key, text = KEYS[f"{section}.{name}"], getattr(getattr(config, section), name)
        return None if text is None else parse_duration(text, key.unit, f"{section}.{name}", clock=key.clock)

    def length(section: str, name: str, total: int | None = None) -> int:
        duration = read(section, name)
        assert duration is not None
        return duration.steps(steps_per_epoch, batch_size, total)

    total = length("optim", "epochs")
    if total < 1:
        raise UserError("the run has no step", "optim.epochs (--epochs)", "make it longer")
    warmup = length("optim", "warmup", total)
    if warmup >= total:
        what = f"{warmup} steps of warm-up leave nothing of {total} steps"
        raise UserError(what, "optim.warmup (--warmup-epochs)", "shorten it, for example to 5%")
    save_every, time_limit = read("checkpoint", "every"), read("run", "time_limit")
    save_seconds = save_every.seconds if save_every else None
    stop_after = max(1, length("run", "stop_after", total)) if config.run.stop_after else None
    if stop_after is not None and stop_after > total:
        what = f"the run ends after {total} steps, before step {stop_after}"
        raise UserError(what, "run.stop_after (--stop-after)", "shorten it, or leave it out")
    return StepSchedule(
        total,
        warmup,
        log_every=max(1, length("run", "log_every", total)),
        eval_every=max(1, length("run", "eval_every", total)),
        save_every=None if save_seconds else max(1, length("checkpoint", "every", total)),
        per_epoch=steps_per_epoch,
        save_seconds=save_seconds,
        milestone_every=max(1, length("checkpoint", "milestones", total)) if config.checkpoint.milestones else None,
        time_limit_seconds=time_limit.seconds if time_limit else None,
        stop_after=stop_after,
        profile=parse_profile_range(config.run.profile, total) if config.run.profile else range(0),
    )


def parse_profile_range(text: str, total: int) -> range:
    """Parse FROM:TO, the steps FROM to TO - 1; raises UserError for anything else and for steps after the last."""
    where = "run.profile (--profile)"
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        raise UserError(f"'{text}' is not FROM:TO", where, "count steps from 1: 20:25 traces five")
    if int(end) > total + 1:
        raise UserError(f"there is no step {int(end) - 1} to trace", where, f"the run has {total} steps")
    return range(int(first), int(end))


def make_lr_scheduler(optimizer: Optimizer, config: Config, steps: StepSchedule) -> Scheduler:
    """Return timm's schedule over updates, warm-up first: stateless, so a resumed run needs only the step.

    Raises UserError if the run is too short for the schedule.
    """
    optim = config.optim
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=optim.schedule,
            num_epochs=steps.total - steps.warmup,
            warmup_epochs=steps.warmup,
            warmup_prefix=True,
            warmup_lr=optim.min_lr,
            min_lr=optim.min_lr,
            decay_rate=1.0,  # timm reads it as the power of `poly`
            step_on_epochs=False,
            updates_per_epoch=1,  # so that timm's epochs are our steps
        )
    except ValueError as error:
        what = f"{steps.total} steps are too few for the schedule '{optim.schedule}'"
        raise UserError(what, "optim.schedule (--sched)", "train longer, or use cosine") from error
    assert isinstance(scheduler, Scheduler)
    return scheduler
