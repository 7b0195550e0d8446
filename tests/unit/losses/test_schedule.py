import pytest

from pdvit.losses.terms import WeightSchedule


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
def test_the_factor_is_the_product_of_its_parts(parts, factors):
    schedule = WeightSchedule(8, **parts)
    assert [schedule(step) for step in range(8)] == pytest.approx(factors)
    assert schedule(99) == (0 if parts.keys() & {"decay", "until"} else 1)  # beyond the end
