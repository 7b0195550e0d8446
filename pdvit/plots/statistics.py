"""Means with their spread, and differences with a 95 % confidence interval (Student's t)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.975  # two-sided 95 %


@dataclass(frozen=True)
class Difference:
    """A difference of means with the ends of its interval, which are missing (NaN) where there is no spread to go by.

    Attributes:
        mean: second minus first.
        low: lower end.
        high: upper end.
        pairs: how many pairs; 0 where none can be paired.
    """

    mean: float
    low: float
    high: float
    pairs: int = 0


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (n - 1), NaN of fewer than one and two values."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def interval(values: Sequence[float]) -> Difference:
    """Return the mean of a sample with its t interval; `pairs` is its size."""
    mean, std = mean_and_std(values)
    half = float(stdtrit(len(values) - 1, LEVEL)) * std / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(mean, mean - half, mean + half, len(values))


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Return second minus first over what both have, by key (a seed): the paired t interval.

    Pairing takes out what a seed does to both, so the interval is narrower than that of two independent samples where
    seeds matter.
    """
    return interval([second[key] - first[key] for key in first if key in second])


def welch(means: tuple[float, float], stds: tuple[float, float], counts: tuple[int, int]) -> Difference:
    """Return second minus first of two samples that are not paired, with unequal spreads (Welch 1947).

    Args:
        means: of both samples.
        stds: standard deviations (n - 1), NaN for a single value.
        counts: sizes.
    """
    difference = means[1] - means[0]
    if min(counts) < 2 or not all(math.isfinite(std) for std in stds):
        return Difference(difference, math.nan, math.nan)
    parts = [std**2 / count for std, count in zip(stds, counts, strict=True)]
    if not sum(parts):
        return Difference(difference, difference, difference)
    freedom = sum(parts) ** 2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    half = float(stdtrit(freedom, LEVEL)) * math.sqrt(sum(parts))
    return Difference(difference, difference - half, difference + half)
