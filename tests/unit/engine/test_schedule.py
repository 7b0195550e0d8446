import math
from itertools import pairwise

import pytest
import torch

from pdvit.config import build
from pdvit.config.schema import SCHEDULES
from pdvit.engine.schedule import StepSchedule, make_lr_scheduler, make_step_schedule
from pdvit.errors import UserError

PER_EPOCH, BATCH, PEAK, FLOOR = 50, 4, 0.1, 0.001


def plan_of(**sections):
    return make_step_schedule(build(("flags", sections)), PER_EPOCH, BATCH)


def rates(schedule="cosine", steps=100, warmup=10, at=None):
    """Return the learning rate at each step, reached one after the other."""
    config = build(("flags", {"optim": {"schedule": schedule, "lr": PEAK, "min_lr": FLOOR}}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make_lr_scheduler(optimizer, config, StepSchedule(steps, warmup, 1, 1, 1, PER_EPOCH))
    found = []
    for step in range(steps + 1) if at is None else [at]:
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_durations_become_steps():
    plan = plan_of(
        optim={"epochs": "6ep", "warmup": "5%"},
        run={"log_every": "10st", "eval_every": "1ep"},
        checkpoint={"every": "400im"},
    )
    assert plan == StepSchedule(total=300, warmup=15, log_every=10, eval_every=50, save_every=100, per_epoch=50)


def test_intervals_can_be_a_fraction_of_the_run_and_are_at_least_one_step():
    intervals = {"log_every": "1%", "eval_every": "50%"}
    plan = plan_of(optim={"epochs": "200st"}, run=intervals, checkpoint={"every": "0.1st"})
    assert (plan.log_every, plan.eval_every, plan.save_every) == (2, 100, 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.epochs", "0.4st", "no step"),
        ("optim.epochs", "1im", "no step"),
        ("optim.warmup", "100%", "warm-up"),
        ("optim.warmup", "3ep", "warm-up"),
        ("run.stop_after", 3, "ends after 100 steps"),
        ("run.profile", "101:102", "not FROM:TO within the 100 steps"),
        ("run.profile", "5:5", "not FROM:TO"),
    ],
)
def test_lengths_that_do_not_fit_the_run_are_refused(key, value, message):
    section, _, name = key.partition(".")
    sections = {"optim": {"epochs": 2}}
    sections.setdefault(section, {})[name] = value
    with pytest.raises(UserError, match=message) as caught:
        plan_of(**sections)
    assert key in caught.value.where


def test_the_last_step_can_be_the_limit():
    plan = plan_of(optim={"epochs": 2}, run={"stop_after": "2ep", "profile": "98:101"})
    assert (plan.stop_after, plan.profile) == (100, range(98, 101))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_from_the_floor_to_the_peak(schedule):
    expected = [FLOOR + (PEAK - FLOOR) * step / 10 for step in range(11)]
    assert rates(schedule)[:11] == pytest.approx(expected)


CURVES = {"cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "poly": lambda x: 1 - x, "constant": lambda x: 1.0}


@pytest.mark.parametrize("schedule", CURVES)
def test_the_rate_follows_its_formula_from_the_peak_to_the_floor(schedule):
    expected = [FLOOR + (PEAK - FLOOR) * CURVES[schedule](done / 90) for done in range(91)]
    assert rates(schedule)[10:] == pytest.approx(expected)


def test_wsd_stays_at_the_peak_then_falls_to_the_floor():
    after = rates("wsd")[10:]
    assert after[:45] == pytest.approx([PEAK] * 45)
    assert after[-1] == pytest.approx(FLOOR)
    assert all(later <= earlier for earlier, later in pairwise(after))


def test_a_run_too_short_for_a_schedule_is_refused():
    with pytest.raises(UserError) as caught:
        rates("wsd", steps=1, warmup=0)
    assert "optim.schedule" in caught.value.where


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_of_a_step_does_not_depend_on_the_way_there(schedule):
    one_by_one = rates(schedule)
    assert [rates(schedule, at=step)[0] for step in range(0, 101, 7)] == one_by_one[::7]
