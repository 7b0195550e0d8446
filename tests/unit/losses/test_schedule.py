import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdvit.losses import WeightSchedule


def course(total: int, **parts: int) -> list[float]:
    schedule = WeightSchedule(total, **parts)
    return [schedule(step) for step in range(total)]


@pytest.mark.parametrize(
    ("parts", "factors"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"decay": 4}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"until": 3}, [1, 1, 1, 0, 0, 0, 0, 0]),
        ({"warmup": 2, "decay": 2}, [0, 0.5, 1, 1, 1, 1, 1, 0.5]),
        ({"warmup": 4, "until": 6}, [0, 0.25, 0.5, 0.75, 1, 1, 0, 0]),
        ({"warmup": 8, "decay": 8}, [0, 7 / 64, 12 / 64, 15 / 64, 16 / 64, 15 / 64, 12 / 64, 7 / 64]),
        ({"warmup": 16}, [0, 1 / 16, 2 / 16, 3 / 16, 4 / 16, 5 / 16, 6 / 16, 7 / 16]),
        ({"warmup": 0, "decay": 0, "until": 0}, [0] * 8),
    ],
    ids=str,
)
def test_the_factor_runs_as_its_parts_say(parts, factors):
    assert course(8, **parts) == pytest.approx(factors)


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 60), st.none() | st.integers(0, 60), st.integers(0, 200))
def test_a_factor_is_between_0_and_1_also_beyond_the_end(total, warmup, decay, until, step):
    assert 0 <= WeightSchedule(total, warmup, decay, until)(step) <= 1


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 60), st.none() | st.integers(0, 60))
def test_constant_is_what_never_leaves_1(total, warmup, decay, until):
    schedule = WeightSchedule(total, warmup, decay, until)
    if schedule.constant:
        assert all(schedule(step) == 1 for step in range(total))
    assert schedule.constant == (not warmup and not decay and until is None)
