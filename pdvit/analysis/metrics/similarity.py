"""Lengths of the tokens, P without outliers, drift, and the distribution of the cosines of all pairs of patches."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.analysis.metrics.patches import MAX_EXACT_PATCHES, ROUNDING, Patches
from pdvit.similarity import SHORTEST, row_blocks

PERCENTILES = (5, 25, 50, 75, 95)
BINS = 100  # bars of the histogram over [-1, 1]
SAMPLED_PAIRS = 2**20

DEVIATIONS = 5  # our choice: a token is an outlier above twice the median and five robust standard deviations beyond it
NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


def outliers(lengths: Tensor) -> Tensor:
    """Return a mask of the tokens that are far longer than the rest of their image, from lengths `(B, N)`.

    Longer than median + max(median, 5 * 1.4826 * median absolute deviation). The first term keeps out differences that
    are only rounding, the second the tail of a wide distribution. At least half of the tokens are no outliers.
    """
    middle = lengths.quantile(0.5, -1, keepdim=True)
    deviation = NORMAL * (lengths - middle).abs().quantile(0.5, -1, keepdim=True)
    return lengths > middle + torch.maximum(middle, DEVIATIONS * deviation)


def norm_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of lengths, and P without outliers."""
    lengths = patches.lengths
    excluded = outliers(lengths)
    rest = patches.similarity
    if excluded.device.type != "cpu" or bool(excluded.any()):  # the host would wait for the answer of a GPU
        total = number = torch.zeros((), device=lengths.device)
        for i, j, cosines in patches.pairs():
            kept = ~(excluded.index_select(1, i) | excluded.index_select(1, j))
            total, number = total + (cosines.abs() * kept).sum(1), number + kept.sum(1)
        rest = total / number
    return {
        "norm_mean": lengths.mean(1),
        "norm_std": lengths.std(1),
        "norm_peak": lengths.amax(1).clamp_min(SHORTEST) / lengths.quantile(0.5, -1).clamp_min(SHORTEST),
        "norm_outliers": excluded.float().mean(1),
        "similarity_without_outliers": rest,
    }


def drift_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of drift; none if this layer can't be compared with the first.

    Retrieval is the fraction of patches whose nearest patch of the first layer, by cosine, is their own. Patches within
    1e-6 of the nearest count as equally near and divide the hit: identical tokens give 1 / N, the chance level.
    """
    unit, first = patches.unit, patches.first
    if first is None:
        return {}
    hits = unit.new_zeros(len(unit))
    for rows in row_blocks(unit):
        cosines = unit[:, rows] @ first.transpose(1, 2)
        nearest = cosines >= cosines.amax(-1, keepdim=True) - ROUNDING
        own = nearest.diagonal(offset=rows.start, dim1=1, dim2=2)
        hits += (own / nearest.sum(-1)).sum(-1)
    return {"drift_cosine": (unit * first).sum(-1).mean(-1), "drift_retrieval": hits / unit.shape[1]}


def pair_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return percentiles (linear) and histogram of the cosines of all pairs: fractions in `BINS` parts of [-1, 1].

    On a CPU, blocks are sorted by numpy: it is ten times as fast as torch.
    """
    images, count, _ = patches.tokens.shape
    generator, device = np.random.default_rng(0), patches.tokens.device
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64, device=device).expand(images, -1)
    fraction = SAMPLED_PAIRS / (count * (count - 1) / 2) if count > MAX_EXACT_PATCHES else None
    below, chosen = torch.zeros_like(edges), list[Tensor]()
    for _, _, cosines in patches.pairs():
        ordered = _sorted(cosines)
        pairs = ordered.shape[1]
        below += F.pad(torch.searchsorted(ordered, edges[:, :-1].to(ordered.dtype).contiguous()), (0, 1), value=pairs)
        if fraction is not None:  # each block gives its part of the sample, so no more than a block exists at a time
            sample = torch.from_numpy(generator.integers(pairs, size=round(fraction * pairs)))
            ordered = ordered[:, sample.to(device, non_blocking=True)]
        chosen.append(ordered)
    ordered = chosen[0] if fraction is None else _sorted(torch.cat(chosen, 1))
    places = {f"pairs_p{at:02}": divmod(at / 100 * (ordered.shape[1] - 1), 1) for at in PERCENTILES}
    metrics = {
        name: ordered[:, int(low)].lerp(ordered[:, math.ceil(low + part)], part) for name, (low, part) in places.items()
    }
    return metrics | {"histogram": below.diff(dim=1) / below[:, -1:], "edges": edges}


def _sorted(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), 1))
    return values.sort(1).values
