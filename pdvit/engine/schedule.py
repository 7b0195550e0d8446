"""Durations of a run in steps, and the learning rate as a function of the step."""

from dataclasses import dataclass
from typing import Any

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from pdvit.config.duration import parse_duration
from pdvit.config.schema import KEYS, Config
from pdvit.errors import UserError

# Settings that hold durations, and their fields below; a time in seconds has a field of its own.
DURATIONS = {"optim.warmup": "warmup", "run.log_every": "log_every", "run.eval_every": "eval_every"}
DURATIONS |= {"checkpoint.every": "save_every", "checkpoint.milestones": "milestone_every"}
DURATIONS |= {"run.time_limit": "time_limit", "run.stop_after": "stop_after"}


@dataclass(frozen=True)
class StepSchedule:
    """The length of a run and the intervals between its events, in steps unless the name has another unit."""

    total: int
    per_epoch: int
    profile: range = range(0)
    warmup: int = 0
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    save_every_seconds: float | None = None
    milestone_every: int | None = None
    time_limit_seconds: float | None = None
    stop_after: int | None = None  # even if it is the last step: the run can then be made longer

    def due(self, step: int, *intervals: int | None) -> bool:
        """Return whether an event with one of these intervals is due after `step`; every event is due at the end."""
        return step == self.total or any(every and step % every == 0 for every in intervals)


def make_step_schedule(config: Config, steps_per_epoch: int, batch_size: int) -> StepSchedule:
    """Convert durations to steps, intervals to at least one; raises UserError if they do not fit the run."""
    total = parse_duration(config.optim.epochs, "ep", "optim.epochs").steps(steps_per_epoch, batch_size)
    if total < 1:
        raise UserError("the run has no step", "optim.epochs (--epochs)", "make it longer")
    profile = config.run.profile or ""
    first, _, end = profile.partition(":")
    if profile and not (first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end) <= total + 1):
        what = f"'{profile}' is not FROM:TO within steps 1 to {total}"
        raise UserError(what, "run.profile (--profile)", "count steps from 1: 20:25 traces the five steps 20 to 24")
    lengths = dict[str, Any]()
    for name, field in DURATIONS.items():
        section, _, key = name.partition(".")
        text = getattr(getattr(config, section), key)
        if text is not None:
            duration = parse_duration(text, KEYS[name].unit, name, clock=KEYS[name].clock)
            if duration.seconds is not None:
                lengths[f"{field}_seconds"] = duration.seconds
            else:
                lengths[field] = max(0 if field == "warmup" else 1, duration.steps(steps_per_epoch, batch_size, total))
    steps = StepSchedule(total, steps_per_epoch, range(int(first), int(end)) if profile else range(0), **lengths)
    if steps.warmup >= total:
        what = f"the warm-up ends at step {steps.warmup}, and the run at step {total}"
        raise UserError(what, "optim.warmup (--warmup-epochs)", "shorten it, for example to 5%")
    if steps.stop_after is not None and steps.stop_after > total:
        what = f"the run ends after step {total}, before step {steps.stop_after}"
        raise UserError(what, "run.stop_after (--stop-after)", "shorten it, or leave it out")
    return steps


def make_lr_scheduler(optimizer: Optimizer, config: Config, steps: StepSchedule) -> Scheduler:
    """Return timm's schedule, whose state is only the step; raises UserError if the run is too short for it."""
    optim = config.optim
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=optim.schedule,
            num_epochs=steps.total - steps.warmup,
            warmup_epochs=steps.warmup,
            warmup_prefix=True,
            warmup_lr=optim.min_lr or 0.0,
            min_lr=optim.min_lr or 0.0,
            decay_rate=1.0,  # timm reads it as the power of `poly`
            step_on_epochs=False,
            updates_per_epoch=1,  # so that timm's epochs are our steps
        )
    except ValueError as error:
        what = f"a run to step {steps.total} is too short for the schedule '{optim.schedule}'"
        raise UserError(what, "optim.schedule (--sched)", "train longer, or use cosine") from error
    assert isinstance(scheduler, Scheduler)
    return scheduler
