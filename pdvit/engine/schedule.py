"""Durations of a run in steps, and the learning rate as a function of the step."""

from dataclasses import dataclass

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from pdvit.config.duration import parse_duration
from pdvit.config.schema import KEYS, Config
from pdvit.errors import UserError


@dataclass(frozen=True)
class StepSchedule:
    """The length of a run and the intervals between its events, in steps unless the name has another unit."""

    total: int
    warmup: int
    log_every: int | None
    eval_every: int | None
    save_every: int | None
    per_epoch: int
    save_seconds: float | None = None
    milestone_every: int | None = None
    time_limit_seconds: float | None = None
    stop_after: int | None = None
    """The step after which to stop, even if it is the last: the run can then be made longer."""
    profile: range = range(0)

    def due(self, step: int, *intervals: int | None) -> bool:
        """Return whether an event with one of these intervals is due after `step`; every event is due at the end."""
        return step == self.total or any(every and step % every == 0 for every in intervals)


def make_step_schedule(config: Config, steps_per_epoch: int, batch_size: int) -> StepSchedule:
    """Convert the configuration's durations to steps; an interval is at least one step.

    Raises UserError if the run has no step or only warm-up, or if it is to stop or to be traced after its end.
    """

    def length(name: str, minimum: int = 1) -> tuple[int | None, float | None]:
        """Return the value of a setting in steps, or in seconds if it is a time."""
        section, _, field = name.partition(".")
        text = getattr(getattr(config, section), field)
        if text is None:
            return None, None
        duration = parse_duration(text, KEYS[name].unit, name, clock=KEYS[name].clock)
        if duration.seconds is not None:
            return None, duration.seconds
        return max(minimum, duration.steps(steps_per_epoch, batch_size, total)), None

    total = parse_duration(config.optim.epochs, "ep", "optim.epochs").steps(steps_per_epoch, batch_size)
    if total < 1:
        raise UserError("the run has no step", "optim.epochs (--epochs)", "make it longer")
    warmup = length("optim.warmup", minimum=0)[0] or 0
    if warmup >= total:
        what = f"{warmup} steps of warm-up leave nothing of {total} steps"
        raise UserError(what, "optim.warmup (--warmup-epochs)", "shorten it, for example to 5%")
    stop_after, _ = length("run.stop_after")
    if stop_after is not None and stop_after > total:
        what = f"the run ends after {total} steps, before step {stop_after}"
        raise UserError(what, "run.stop_after (--stop-after)", "shorten it, or leave it out")
    profile = config.run.profile or ""
    first, _, end = profile.partition(":")
    if profile and not (first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end) <= total + 1):
        what = f"'{profile}' is not FROM:TO within the {total} steps of the run"
        raise UserError(what, "run.profile (--profile)", "count steps from 1: 20:25 traces the five steps 20 to 24")
    save_every, save_seconds = length("checkpoint.every")
    return StepSchedule(
        total,
        warmup,
        log_every=length("run.log_every")[0],
        eval_every=length("run.eval_every")[0],
        save_every=save_every,
        per_epoch=steps_per_epoch,
        save_seconds=save_seconds,
        milestone_every=length("checkpoint.milestones")[0],
        time_limit_seconds=length("run.time_limit")[1],
        stop_after=stop_after,
        profile=range(int(first), int(end)) if profile else range(0),
    )


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
