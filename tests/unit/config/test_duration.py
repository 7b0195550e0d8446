import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdvit.config import Duration, build, parse_duration, resolve
from pdvit.config.duration import EXAMPLES, weight_schedule
from pdvit.errors import UserError
from tests.errors import refused


@pytest.mark.parametrize(
    "text", ["", "ep", "-1ep", "1.2.3", ".", "1e400", "nan", "inf", "1 2", "3ep4", "10minutes", "1e16", "²", "101%"]
)
def test_other_text_is_an_error(text):
    with refused("not a valid length of training") as caught:
        parse_duration(text, "ep", "optim.epochs")
    assert caught.value.where == "optim.epochs"


@pytest.mark.parametrize(
    ("unit", "percent", "clock", "units"),
    [
        ("ep", True, True, EXAMPLES.keys()),
        ("ep", False, False, {"ep", "st", "im"}),
        ("st", True, False, {"ep", "st", "im", "%"}),
        ("min", True, True, {"min", "h", "s"}),
    ],
)
def test_a_key_takes_its_units_and_the_tip_names_them(unit, percent, clock, units):
    with refused() as caught:
        parse_duration("soon", unit, "here", percent, clock)
    assert {name for name, form in EXAMPLES.items() if form in caught.value.tip} == units
    for name, form in EXAMPLES.items():
        if name in units:
            assert parse_duration(form, unit, "here", percent, clock).unit == name
        else:
            with refused("not a valid"):
                parse_duration(form, unit, "here", percent, clock)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("3ep", 30), (" .5 EP ", 5), ("0.5", 5), ("17st", 17), ("8e1im", 20), ("5%", 10), ("100%", 200), ("0.26ep", 3)],
)
def test_lengths_in_steps_and_times_in_seconds_equal_those_by_hand(duration, steps):
    assert parse_duration(duration, "ep", "here").steps(steps_per_epoch=10, batch_size=4, total=200) == steps
    times = [parse_duration(text, "min", "here").seconds for text in ("10min", "1.5h", "20s", "3")]
    assert times == [600, 5400, 20, 180]


@settings(max_examples=50)
@given(st.text())
def test_any_text_is_a_finite_duration_or_a_user_error(text):
    try:
        duration = parse_duration(text, "ep", "here")
    except UserError:
        return
    assert math.isfinite(duration.value)
    assert duration.value >= 0


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (" constant ", {}),
        ("warmup:3", {"warmup": Duration(3, "ep")}),
        ("warmup:200st, until:10%", {"warmup": Duration(200, "st"), "until": Duration(10, "%")}),
    ],
)
def test_the_schedule_of_a_weight_is_parsed(text, parts):
    diversity = build(("flags", {"diversity": {"koleo_schedule": text}})).diversity
    assert weight_schedule(diversity, "koleo") == parts


@pytest.mark.parametrize(
    ("text", "what", "tip"),
    [
        ("warmpu:3ep", "warmpu", "'warmup'"),
        ("warmup", "not a valid length", "30ep"),
        ("warmup:3ep,warmup:4ep", "twice", "once"),
        ("until:10min", "10min", "30ep"),
    ],
)
def test_other_schedules_are_errors_before_the_run(text, what, tip):
    with refused(what, tip=tip) as caught:
        resolve(build(("flags", {"diversity": {"mixing_schedule": text}})))
    assert caught.value.where == "diversity.mixing_schedule (--mixing-schedule)"
