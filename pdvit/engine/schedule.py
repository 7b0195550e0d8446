"""Lengths of a run in steps, and the learning rate as a function of the step."""

from dataclasses import dataclass

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from pdvit.config.duration import Duration, parse_duration
from pdvit.config.schema import Config, info_of
from pdvit.errors import UserError


@dataclass(frozen=True)
class Plan:
    """How many steps a run has, and how many lie between its events."""

    steps: int
    warmup: int
    log_every: int
    eval_every: int
    save_every: int | None
    steps_per_epoch: int
    save_seconds: float | None = None
    """Seconds between saves, where they go by the clock and not by steps."""
    milestone: int | None = None
    time_limit: float | None = None
    """Seconds after which to stop."""
    stop_after: int | None = None
    """The step after which to stop, even if it is the last: the run can then be made longer."""
    profile: range = range(0)
    """Steps to trace."""

    def due(self, every: int | None, step: int) -> bool:
        """Tell whether something that comes every so many steps, and at the end, is due after `step`."""
        return step == self.steps or (every is not None and step % every == 0)

    def at_milestone(self, step: int) -> bool:
        """Tell whether the checkpoint after `step` is kept for good."""
        return self.milestone is not None and step % self.milestone == 0


def make_plan(config: Config, steps_per_epoch: int, batch_size: int) -> Plan:
    """Turn the configuration's durations into steps; an interval is at least one step.

    Raises UserError where the run would have no step or be all warm-up, and where it is to stop after its end.
    """

    def read(section: str, name: str) -> Duration | None:
        part = getattr(config, section)
        info = info_of(type(part).__dataclass_fields__[name])
        text = getattr(part, name)
        return None if text is None else parse_duration(text, info.unit, f"{section}.{name}", clock=info.clock)

    def length(section: str, name: str, total: int | None = None) -> int:
        duration = read(section, name)
        assert duration is not None
        return duration.steps(steps_per_epoch, batch_size, total)

    total = length("optim", "epochs")
    if total < 1:
        raise UserError("the run has no step", "optim.epochs (--epochs)", "make it longer")
    warmup = length("optim", "warmup", total)
    if warmup >= total:
        raise UserError(
            f"{warmup} steps of warm-up leave nothing of {total} steps",
            "optim.warmup (--warmup-epochs)",
            "shorten it, for example to 5%",
        )
    log, evaluate = (max(1, length("run", name, total)) for name in ("log_every", "eval_every"))
    every, milestones, limit = read("checkpoint", "every"), read("checkpoint", "milestones"), read("run", "time_limit")
    pause = max(1, length("run", "stop_after", total)) if config.run.stop_after else None
    if pause is not None and pause > total:
        what = f"the run ends after {total} steps, before step {pause}"
        raise UserError(what, "run.stop_after (--stop-after)", "shorten it, or leave it out")
    by_clock = every.seconds if every else None
    return Plan(
        total,
        warmup,
        log,
        evaluate,
        None if by_clock else max(1, length("checkpoint", "every", total)),
        steps_per_epoch,
        by_clock,
        max(1, length("checkpoint", "milestones", total)) if milestones else None,
        limit.seconds if limit else None,
        pause,
        parse_span(config.run.profile, total),
    )


def parse_span(text: str | None, total: int) -> range:
    """Read FROM:TO as the steps from FROM up to, but not with, TO.

    Raises UserError for anything else, and for steps that a run of `total` steps does not have.
    """
    if text is None:
        return range(0)
    where = "run.profile (--profile)"
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) < int(last)):
        raise UserError(f"'{text}' is not FROM:TO", where, "count steps from 1: 20:25 traces five")
    if int(last) > total + 1:
        raise UserError(f"there is no step {int(last) - 1} to trace", where, f"the run has {total} steps")
    return range(int(first), int(last))


def make_scheduler(optimizer: Optimizer, config: Config, plan: Plan) -> Scheduler:
    """Return timm's schedule over updates, warm-up first: stateless, so a resumed run needs only the step.

    Raises UserError where the run is too short for the schedule.
    """
    optim = config.optim
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=optim.schedule,
            num_epochs=plan.steps - plan.warmup,
            warmup_epochs=plan.warmup,
            warmup_prefix=True,
            warmup_lr=optim.min_lr,
            min_lr=optim.min_lr,
            decay_rate=1.0,  # timm reads it as the power of `poly`
            step_on_epochs=False,
            updates_per_epoch=1,  # so that timm's epochs are our steps
        )
    except ValueError as error:
        what = f"{plan.steps} steps are too few for the schedule '{optim.schedule}'"
        raise UserError(what, "optim.schedule (--sched)", "train longer, or use cosine") from error
    assert isinstance(scheduler, Scheduler)
    return scheduler
