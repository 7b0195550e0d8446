"""How the cosines of all pairs of patches are distributed: exact percentiles without ever holding all pairs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pdvit.analysis.metrics.group import Definition, Group, Patches
from pdvit.analysis.metrics.sample import error_of_quantiles
from pdvit.similarity import BLOCK_ENTRIES

PERCENTILES = (5, 25, 50, 75, 95)
NORMAL = {5: "-1.645", 25: "-0.674", 75: "0.674", 95: "1.645"}
# Bars of the histogram over [-1, 1].
BINS = 100
# A float32 is found by its 16 upper bits, then by its 16 lower ones.
HALF = 2**16


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

    Linear between neighbouring values, as numpy does by default. Exact for any number of tokens: where the pairs of one
    image are more than a block of cosines, they are counted instead of sorted, at the memory of a block.
    """
    count = unit.shape[1]
    shares = torch.tensor(at, dtype=torch.float64, device=unit.device) / 100
    if count**2 > BLOCK_ENTRIES:
        return torch.stack([_counted(image, shares) for image in unit])
    parts = unit.split(BLOCK_ENTRIES // count**2)
    return torch.cat([torch.cat([*pair_cosines(part)], 1).double().quantile(shares, 1).T for part in parts])


def _counted(unit: Tensor, shares: Tensor) -> Tensor:
    """Return quantiles of the cosines of one image's tokens `(N, D)`, as a radix sort finds them.

    The pairs are made twice: each wanted value is found by the upper half of its bits, then by the lower.
    """
    places = shares * (len(unit) * (len(unit) - 1) // 2 - 1)
    ranks = torch.cat([places.floor(), places.ceil()]).long()
    counts = torch.zeros(HALF, dtype=torch.long, device=unit.device)
    for cosines in pair_cosines(unit[None]):
        counts += (_key(cosines[0]) >> 16).bincount(minlength=HALF)
    upper, ranks = _locate(counts.expand(len(ranks), -1), ranks)
    counts = torch.zeros(len(ranks), HALF, dtype=torch.long, device=unit.device)
    for cosines in pair_cosines(unit[None]):
        keys = _key(cosines[0])
        for number, wanted in enumerate(upper):
            counts[number] += (keys[keys >> 16 == wanted] & (HALF - 1)).bincount(minlength=HALF)
    lower, _ = _locate(counts, ranks)
    below, above = _value((upper << 16) + lower).double().chunk(2)
    return below + (above - below) * (places - places.floor())


def histogram(unit: Tensor, bins: int = BINS) -> Tensor:
    """Return the share of the pairs of each image in each of `bins` equal parts of [-1, 1], `(B, bins)`."""
    total = sum(_bars(cosines, bins) for cosines in pair_cosines(unit))
    assert isinstance(total, Tensor)
    return total.double() / total.sum(1, keepdim=True)


def _bars(cosines: Tensor, bins: int) -> Tensor:
    """Count the values of each row in `bins` equal parts of [-1, 1], `(B, bins)`."""
    offsets = torch.arange(len(cosines), device=cosines.device)[:, None] * bins
    numbers = ((cosines + 1) * (bins / 2)).long().clamp_max(bins - 1)
    return (numbers + offsets).flatten().bincount(minlength=len(cosines) * bins).view(-1, bins)


def _key(values: Tensor) -> Tensor:
    """Return integers from 0 to 2^32 - 1 that lie in the order of the float32 values."""
    bits = values.float().contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -bits - 1, bits + 2**31)


def _value(keys: Tensor) -> Tensor:
    """Undo `_key`."""
    bits = torch.where(keys < 2**31, -keys - 1, keys - 2**31)
    return bits.int().view(torch.float32)


def _locate(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return in which of the counted numbers `(R, K)` each rank `(R,)` falls, and its rank among those."""
    ends = counts.cumsum(-1)
    number = torch.searchsorted(ends, ranks[:, None], right=True)
    before = ends.gather(1, number) - counts.gather(1, number)
    return number[:, 0], ranks - before[:, 0]


def _pairs(patches: Patches) -> dict[str, Tensor]:
    names = [f"pairs_p{at:02}" for at in PERCENTILES]
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64).expand(len(patches.tokens), -1)
    if patches.pairs is None:
        found = dict(zip(names, percentiles(patches.unit).unbind(1), strict=True))
        return found | {"histogram": histogram(patches.unit), "edges": edges}
    cosines = patches.cosines
    shares = torch.tensor(PERCENTILES, dtype=torch.float64, device=cosines.device) / 100
    values = torch.stack([row.double().quantile(shares) for row in cosines])
    found = dict(zip(names, values.unbind(1), strict=True))
    errors = zip(names, error_of_quantiles(cosines, shares).unbind(1), strict=True)
    found |= {f"error/{name}": value for name, value in errors}
    return found | {"histogram": _bars(cosines, BINS).double() / cosines.shape[1], "edges": edges}


PAIRS = Group(
    _pairs,
    {
        f"pairs_p{at:02}": Definition(
            f"the {at}th percentile of cos over all pairs i < j of an image",
            "-1 to 1",
            f"about {'0' if at == 50 else f'{NORMAL[at]}/√d'}",
            "1",
            "none for the median; outer ones of few pairs are drawn in",
            "ours",
        )
        for at in PERCENTILES
    },
    {
        "histogram": f"share of the pairs in each of {BINS} equal parts of [-1, 1]",
        "edges": "where the parts begin and end",
    },
    shown={"pairs_p05": "cos 5%", "pairs_p50": "50%", "pairs_p95": "95%"},
)
