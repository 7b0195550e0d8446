import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdvit.config import Duration, parse_duration
from pdvit.errors import UserError


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("30ep", 30, "ep"),
        ("2000st", 2000, "st"),
        ("1e6im", 1_000_000, "im"),
        ("5%", 5, "%"),
        (" 1.5 EP ", 1.5, "ep"),
        ("0.5", 0.5, "st"),
        ("7", 7, "st"),
        ("100%", 100, "%"),
    ],
)
def test_a_duration_has_a_value_and_a_unit(text, value, unit):
    assert parse_duration(text, "st", "here") == Duration(value, unit)


@pytest.mark.parametrize(
    "text",
    ["", "ep", "abc", "-1", "-1ep", "1.2.3", ".", "1e400", "nan", "inf", "1 2", "3ep4", "10minutes", "1e16", "²"],
)
def test_other_text_is_refused(text):
    with pytest.raises(UserError, match="not a length of training") as caught:
        parse_duration(text, "ep", "optim.epochs")
    assert caught.value.where == "optim.epochs"


@pytest.mark.parametrize("text", ["101%", "1e3%"])
def test_more_than_all_of_a_run_is_refused(text):
    with pytest.raises(UserError, match="can't be used"):
        parse_duration(text, "ep", "here")


def test_percent_is_refused_where_there_is_nothing_to_take_it_of():
    with pytest.raises(UserError, match="can't be used"):
        parse_duration("5%", "ep", "here", percent=False)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(3, "ep"), 30),
        (Duration(0.5, "ep"), 5),
        (Duration(17, "st"), 17),
        (Duration(80, "im"), 20),
        (Duration(5, "%"), 10),
        (Duration(0.26, "ep"), 3),
    ],
)
def test_lengths_in_steps_are_worked_out_by_hand(duration, steps):
    assert duration.steps(steps_per_epoch=10, batch_size=4, total=200) == steps


@given(st.floats(0, 1e15), st.sampled_from(["ep", "st", "im"]))
def test_what_is_written_is_read_back(value, unit):
    assert parse_duration(f"{value}{unit}", "ep", "here") == Duration(value, unit)


@given(st.text())
def test_any_text_is_a_sound_duration_or_a_user_error(text):
    try:
        duration = parse_duration(text, "ep", "here")
    except UserError:
        return
    assert math.isfinite(duration.value)
    assert duration.value >= 0
    assert duration.unit in ("ep", "st", "im", "%")


@pytest.mark.parametrize(("text", "seconds"), [("10min", 600), ("1.5h", 5400), ("20s", 20), ("3", 180)])
def test_a_time_is_a_duration_where_the_clock_may_decide(text, seconds):
    assert parse_duration(text, "min", "here", clock=True).seconds == seconds


@pytest.mark.parametrize("text", ["3ep", "5%", "2000st", "soon", ""])
def test_what_is_no_time_is_refused_where_only_a_time_will_do(text):
    with pytest.raises(UserError, match="is not a time") as caught:
        parse_duration(text, "min", "run.time_limit", clock=True)
    assert "90min" in caught.value.tip
    assert not any(form in caught.value.tip for form in ("30ep", "2000st", "5%"))


@pytest.mark.parametrize(
    ("key", "percent", "clock"),
    [("checkpoint.every", True, True), ("optim.epochs", False, False), ("run", True, False)],
)
def test_a_tip_names_the_forms_that_the_key_takes(key, percent, clock):
    with pytest.raises(UserError) as caught:
        parse_duration("soon", "ep", key, percent, clock)
    for form, taken in (("30ep", True), ("5%", percent), ("10min", clock)):
        assert (form in caught.value.tip) == taken
        if taken:
            parse_duration(form, "ep", key, percent, clock)


@pytest.mark.parametrize("text", ["10min", "1h", "5s"])
def test_a_time_is_refused_where_a_length_of_training_is_meant(text):
    with pytest.raises(UserError, match="can't be used") as caught:
        parse_duration(text, "ep", "optim.epochs")
    assert "30ep" in caught.value.tip
