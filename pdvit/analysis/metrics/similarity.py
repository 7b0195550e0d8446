"""Lengths of the tokens, P without outliers, drift, and the distribution of the cosines of all pairs of patches."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import ROUNDING, Patches
from pdvit.similarity import BLOCK_ENTRIES, SHORTEST, patch_similarity, row_blocks

PERCENTILES = (5, 25, 50, 75, 95)
BINS = 100  # bars of the histogram over [-1, 1]
# Percentiles are exact up to this number of patches; above it, they come from a random sample of so many pairs.
MAX_EXACT_PATCHES, SAMPLED_PAIRS = 2048, 2**20

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
    lengths, count = patches.lengths, patches.lengths.shape[1]
    excluded = outliers(lengths)
    shortest = lengths.new_tensor(SHORTEST)
    rest, affected = patches.similarity.clone(), excluded.any(1)
    if bool(affected.any()):
        kept = count - excluded[affected].sum(1)
        # a token of length 0 adds nothing to the sum of |cos|, so only the number of pairs is corrected
        similarity = patch_similarity(patches.tokens[affected].masked_fill(excluded[affected][..., None], 0))
        rest[affected] = similarity * (count * (count - 1) / (kept * (kept - 1)))
    return {
        "norm_mean": lengths.mean(1),
        "norm_std": lengths.std(1),
        "norm_peak": lengths.amax(1).maximum(shortest) / lengths.quantile(0.5, -1).maximum(shortest),
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


def pair_cosines(unit: Tensor) -> Iterator[Tensor]:
    """Yield the cosines of all pairs i < j of unit tokens `(B, N, D)`, in blocks `(B, K)`."""
    for rows in row_blocks(unit):
        cosines = unit[:, rows] @ unit[:, rows.start :].transpose(1, 2)
        above = torch.ones(cosines.shape[1:], dtype=torch.bool, device=unit.device).triu(1)
        yield cosines[:, above].clamp(-1, 1)


def percentiles(unit: Tensor) -> Tensor:
    """Return the `PERCENTILES` of the cosines of all pairs of unit tokens `(B, N, D)`: `(B, 5)`, float64, linear."""
    count = unit.shape[1]
    fractions = torch.tensor(PERCENTILES, dtype=torch.float64, device=unit.device) / 100
    if count > MAX_EXACT_PATCHES:
        return torch.stack([sampled_cosines(image).double().quantile(fractions) for image in unit])
    parts = unit.split(BLOCK_ENTRIES // count**2)
    return torch.cat([torch.cat([*pair_cosines(part)], 1).double().quantile(fractions, 1).T for part in parts])


def sampled_cosines(unit: Tensor) -> Tensor:
    """Return the cosines of about `SAMPLED_PAIRS` random pairs (seed 0) of unit tokens `(N, D)`."""
    generator = torch.Generator().manual_seed(0)
    fraction = SAMPLED_PAIRS / (len(unit) * (len(unit) - 1) / 2)
    # each block gives its part of the sample, so that no more than a block exists at a time
    blocks = (cosines[0] for cosines in pair_cosines(unit[None]) if cosines.numel())
    draw = partial(torch.randint, generator=generator)
    return torch.cat([block[draw(len(block), (round(fraction * len(block)),))] for block in blocks])


def histogram(unit: Tensor, bins: int = BINS) -> Tensor:
    """Return the fraction of the pairs of each image in each of `bins` equal parts of [-1, 1], `(B, bins)`."""
    blocks = (torch.stack([image.histc(bins, -1, 1) for image in cosines]).double() for cosines in pair_cosines(unit))
    total = torch.stack(list(blocks)).sum(0)
    return total / total.sum(1, keepdim=True)


def pair_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return percentiles and histogram of the cosines of all pairs."""
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64).expand(len(patches.tokens), -1)
    values = zip(PERCENTILES, percentiles(patches.unit).unbind(1), strict=True)
    return {f"pairs_p{at:02}": value for at, value in values} | {"histogram": histogram(patches.unit), "edges": edges}
