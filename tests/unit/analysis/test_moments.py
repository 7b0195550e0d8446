import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pdvit.analysis.measure import Moments

few = settings(max_examples=60, deadline=None)


def collect(*chunks: list[float]) -> Moments:
    moments = Moments()
    for chunk in chunks:
        moments.update(torch.tensor(chunk, dtype=torch.float64))
    return moments


@few
@given(
    values=st.lists(st.floats(-1, 1), min_size=2, max_size=40),
    cuts=st.sets(st.integers(1, 39), max_size=6),
)
def test_equals_numpy_and_scipy_however_values_are_cut(values, cuts):
    moments = collect(*[part.tolist() for part in np.split(np.array(values), sorted(cuts)) if len(part)])
    assert moments.count == len(values)
    assert moments.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert moments.std == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    if np.std(values) > 1e-6:  # scipy has no interval without spread
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert moments.ci95 == pytest.approx((high - low) / 2, rel=1e-6)


def test_a_single_value_has_no_spread():
    moments = collect([0.25])
    assert (moments.count, moments.mean, moments.std, moments.ci95) == (1, 0.25, None, None)


def test_a_small_spread_on_a_large_mean_is_not_lost():
    values = [1e6 + 1e-3 * i for i in range(10)]
    assert collect(values[:3], values[3:]).std == pytest.approx(np.std(values, ddof=1), rel=1e-6)
