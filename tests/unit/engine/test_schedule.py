import pytest
import torch

from pdvit.config import build
from pdvit.config.schema import SCHEDULES
from pdvit.engine.schedule import StepSchedule, make_lr_scheduler, make_step_schedule
from tests.errors import refused

PER_EPOCH, BATCH, PEAK, FLOOR = 50, 4, 0.1, 0.001


def plan_of(**sections):
    return make_step_schedule(build(("flags", sections)), PER_EPOCH, BATCH)


def rates(schedule="cosine", steps=100, warmup=10, at=None):
    """Return the learning rate at each step, reached one after the other."""
    config = build(("flags", {"optim": {"schedule": schedule, "lr": PEAK, "min_lr": FLOOR}}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make_lr_scheduler(optimizer, config, StepSchedule(steps, PER_EPOCH, warmup=warmup))
    found = []
    for step in range(steps + 1) if at is None else [at]:
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_durations_become_steps():
    run, stops = {"log_every": "1%", "eval_every": "1ep"}, {"stop_after": "6ep", "profile": "298:301"}
    plan = plan_of(optim={"epochs": "6ep", "warmup": "5%"}, run=run | stops, checkpoint={"every": "400im"})
    intervals = {"log_every": 3, "eval_every": 50, "save_every": 100}
    assert plan == StepSchedule(300, 50, range(298, 301), warmup=15, stop_after=300, **intervals)
    assert plan_of(optim={"epochs": "9st"}, checkpoint={"every": "0.1st"}).save_every == 1  # the least
    plan = plan_of(run={"time_limit": "2min"}, checkpoint={"every": "10s"})
    assert (plan.time_limit_seconds, plan.save_every_seconds, plan.save_every) == (120, 10, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.epochs", "0.4st", "no step"),
        ("optim.epochs", "1im", "no step"),
        ("optim.warmup", "100%", "warm-up"),
        ("optim.warmup", "3ep", "warm-up"),
        ("run.stop_after", 3, "ends after step 100"),
        ("run.profile", "101:102", "not FROM:TO within steps 1 to 100"),
        ("run.profile", "5:5", "not FROM:TO"),
    ],
)
def test_lengths_that_do_not_fit_the_run_are_refused(key, value, message):
    section, _, name = key.partition(".")
    sections = {"optim": {"epochs": 2}}
    sections.setdefault(section, {})[name] = value
    with refused(message, where=key):
        plan_of(**sections)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_a_rate_does_not_depend_on_the_way_there(schedule):
    one_by_one = rates(schedule)
    assert one_by_one[:11] == pytest.approx([FLOOR + (PEAK - FLOOR) * step / 10 for step in range(11)])
    assert [rates(schedule, at=step)[0] for step in range(0, 101, 7)] == one_by_one[::7]


def test_a_run_too_short_for_a_schedule_is_refused():
    with refused(where="optim.schedule"):
        rates("wsd", steps=1, warmup=0)
