"""Lengths of a run in steps, and the learning rate as a function of the step."""

from dataclasses import dataclass

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from pdvit.config.duration import parse_duration
from pdvit.config.keys import info_of
from pdvit.config.schema import Config
from pdvit.errors import UserError


@dataclass(frozen=True)
class Plan:
    """How many steps a run has, and how many lie between its events."""

    steps: int
    warmup: int
    log_every: int
    eval_every: int
    save_every: int
    steps_per_epoch: int


def make_plan(config: Config, steps_per_epoch: int, batch_size: int) -> Plan:
    """Turn the configuration's durations into steps; an interval is at least one step.

    Raises UserError where the run would have no step, or would be all warm-up.
    """

    def length(section: str, name: str, total: int | None = None) -> int:
        part = getattr(config, section)
        unit = info_of(type(part).__dataclass_fields__[name]).unit
        duration = parse_duration(getattr(part, name), unit, f"{section}.{name}")
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
    save = max(1, length("checkpoint", "every", total))
    return Plan(total, warmup, log, evaluate, save, steps_per_epoch)


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
