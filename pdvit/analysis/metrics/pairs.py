"""How the cosines of all pairs of patches are distributed: exact percentiles without ever holding all pairs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pdvit.analysis.metrics.group import Definition, Group, Patches
from pdvit.similarity import BLOCK_ENTRIES

PERCENTILES = (5, 25, 50, 75, 95)
NORMAL = {5: "-1.645", 25: "-0.674", 75: "0.674", 95: "1.645"}
# Bars of the histogram over [-1, 1].
BINS = 100
# A float32 is found by its 16 upper bits, then by its 16 lower ones.
HALF = 2**16
# Images whose counters (5 MB each) exist at one moment.
TOGETHER = 8


def pair_cosines(unit: Tensor) -> Iterator[Tensor]:
    """Yield the cosines of all pairs i < j of tokens `(B, N, D)` of length 1, in parts `(B, K)`."""
    images, count, _ = unit.shape
    rows = max(1, min(count, BLOCK_ENTRIES // max(1, images * count)))
    for start in range(0, count - 1, rows):
        cosines = unit[:, start : start + rows] @ unit[:, start:].transpose(1, 2)
        above = torch.ones(cosines.shape[1:], dtype=torch.bool, device=unit.device).triu(1)
        yield cosines[:, above].clamp(-1, 1)


def percentiles(unit: Tensor, at: tuple[int, ...] = PERCENTILES) -> Tensor:
    """Return percentiles of the cosines of all pairs of tokens `(B, N, D)` of length 1: `(B, len(at))`, float64.

    Linear between neighbouring values, as numpy does by default. Exact for any number of tokens at the memory of a
    block of cosines: the pairs are made twice, and each wanted value is found as in a radix sort, the upper half of
    its bits first.
    """
    return torch.cat([_percentiles(part, at) for part in unit.split(TOGETHER)])


def _percentiles(unit: Tensor, at: tuple[int, ...]) -> Tensor:
    images, count, _ = unit.shape
    places = torch.tensor(at, dtype=torch.float64, device=unit.device) / 100 * (count * (count - 1) // 2 - 1)
    ranks = torch.cat([places.floor(), places.ceil()]).long().repeat(images, 1)
    found = sum(_count(_key(cosines) >> 16) for cosines in pair_cosines(unit))
    assert isinstance(found, Tensor)
    upper, ranks = _locate(found[:, None].expand(-1, ranks.shape[1], -1), ranks)
    found = sum(_count_lower(_key(cosines), upper) for cosines in pair_cosines(unit))
    assert isinstance(found, Tensor)
    lower, _ = _locate(found, ranks)
    below, above = _value((upper << 16) + lower).double().chunk(2, 1)
    return below + (above - below) * (places - places.floor())


def histogram(unit: Tensor, bins: int = BINS) -> Tensor:
    """Return the share of the pairs of each image in each of `bins` equal parts of [-1, 1], `(B, bins)`."""
    total = torch.zeros(len(unit), bins, dtype=torch.long, device=unit.device)
    for cosines in pair_cosines(unit):
        total += _count(((cosines + 1) * (bins / 2)).long().clamp_max(bins - 1), bins)
    return total.double() / (unit.shape[1] * (unit.shape[1] - 1) // 2)


def _key(values: Tensor) -> Tensor:
    """Return integers from 0 to 2^32 - 1 that lie in the order of the float32 values."""
    bits = values.float().contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -bits - 1, bits + 2**31)


def _value(keys: Tensor) -> Tensor:
    """Undo `_key`."""
    bits = torch.where(keys < 2**31, -keys - 1, keys - 2**31)
    return bits.int().view(torch.float32)


def _count(numbers: Tensor, size: int = HALF) -> Tensor:
    """Count how often each number from 0 to size - 1 is in each row of `(B, K)`: `(B, size)`."""
    offsets = torch.arange(len(numbers), device=numbers.device)[:, None] * size
    return (numbers + offsets).flatten().bincount(minlength=len(numbers) * size).view(-1, size)


def _count_lower(keys: Tensor, upper: Tensor) -> Tensor:
    """Count the lower bits of the keys `(B, K)` that begin with each of `upper` `(B, R)`: `(B, R, 2^16)`."""
    found = []
    for wanted in upper.T:
        image, place = torch.nonzero((keys >> 16) == wanted[:, None], as_tuple=True)
        numbers = image * HALF + (keys[image, place] & (HALF - 1))
        found.append(numbers.bincount(minlength=len(keys) * HALF).view(-1, HALF))
    return torch.stack(found, 1)


def _locate(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return in which of the counted numbers `(B, R, size)` each rank `(B, R)` falls, and its rank among those."""
    ends = counts.cumsum(-1)
    number = torch.searchsorted(ends, ranks[..., None], right=True)
    before = ends.gather(-1, number) - counts.gather(-1, number)
    return number[..., 0], ranks - before[..., 0]


def _pairs(patches: Patches) -> dict[str, Tensor]:
    found = percentiles(patches.unit)
    values = {f"pairs_p{at:02}": found[:, i] for i, at in enumerate(PERCENTILES)}
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)
    return values | {"histogram": histogram(patches.unit), "edges": edges.expand(len(found), -1)}


PAIRS = Group(
    _pairs,
    {
        f"pairs_p{at:02}": Definition(
            f"the {at}th percentile of cos over all pairs i < j of an image",
            "-1 to 1",
            f"about {'0' if at == 50 else f'{NORMAL[at]}/√d'}",
            "1",
            "none for the median; the tails of few pairs are drawn in",
            "ours (the distribution behind the mean of Gong et al.)",
        )
        for at in PERCENTILES
    },
    {
        "histogram": f"share of the pairs in each of {BINS} equal parts of [-1, 1]",
        "edges": "where the parts begin and end",
    },
    shown={"pairs_p05": "cos 5%", "pairs_p50": "50%", "pairs_p95": "95%"},
)
