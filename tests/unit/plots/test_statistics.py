import math

import numpy as np
import pytest
from scipy import stats

from pdvit.plots.statistics import interval, mean_and_std, paired, welch

close = {"rel": 1e-9, "abs": 1e-9}


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_a_paired_difference_is_that_of_scipy(count):
    rng = np.random.default_rng(count)
    first = rng.normal(0.5, 10, count)
    second = first + rng.normal(0.1, 0.02, count)
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    found = paired(*({str(at): float(value) for at, value in enumerate(side)} for side in (first, second)))
    assert found.pairs == count
    assert found.mean == pytest.approx((second - first).mean(), **close)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), **close)


def test_the_interval_of_a_mean_is_that_of_scipy():
    values = [0.2, 0.5, 0.9, 0.4]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found.mean, found.low, found.high, found.pairs) == pytest.approx((0.5, expected.low, expected.high, 4))


def test_only_seeds_that_both_have_are_paired():
    found = paired({"0": 1.0, "1": 2.0, "2": 9.0}, {"1": 3.0, "0": 1.5, "7": 100.0})
    assert (found.mean, found.pairs) == (0.75, 2)


def test_one_pair_has_no_interval_and_none_no_difference():
    one, none = paired({"0": 1.0}, {"0": 2.0}), paired({"0": 1.0}, {"1": 2.0})
    assert (one.mean, one.pairs, none.pairs) == (1.0, 1, 0)
    assert all(math.isnan(value) for value in (one.low, one.high, none.mean, none.low))


@pytest.mark.parametrize("counts", [(2, 2), (3, 50), (50, 2), (256, 256)])
def test_a_difference_of_two_samples_is_that_of_scipy(counts):
    rng = np.random.default_rng(sum(counts))
    first, second = rng.normal(0.4, 0.1, counts[0]), rng.normal(0.6, 0.01, counts[1])
    expected = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    sides = [mean_and_std(first.tolist()), mean_and_std(second.tolist())]
    (one, other), stds = zip(*sides, strict=True)
    found = welch((one, other), stds, (len(first), len(second)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), **close)


def test_samples_without_spread_differ_for_certain_and_single_values_have_no_interval():
    certain, single = welch((1, 3), (0, 0), (4, 4)), welch((1, 3), (math.nan, 0.1), (1, 4))
    assert (certain.low, certain.mean, certain.high) == (2, 2, 2)
    assert single.mean == 2
    assert math.isnan(single.low)


def test_mean_and_spread_of_few_values():
    assert mean_and_std([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert math.isnan(mean_and_std([1.0])[1])
    assert math.isnan(mean_and_std([])[0])
