"""Some of the pairs of patches instead of all, for very large maps: drawn at random, so that the error is known.

Each pair i != j is drawn uniformly, independently of the others, and with replacement. So the cosines of a sample are
independent draws from those of all pairs, and the standard errors are those of the textbook. Their number is a multiple
of the number of patches: time and memory grow with N.
"""

import math

import torch
from torch import Tensor

from pdvit.similarity import BLOCK_ENTRIES

# Pairs for each patch. A standard error is at most 1 / sqrt(4 * 32 N): 0.0014 at 4,096 patches.
PER_PATCH = 32
SEED = 0


def draw_pairs(count: int, device: torch.device | None = None, seed: int = SEED) -> Tensor | None:
    """Return 32 pairs for each of `count` patches, `(2, M)`; None where there are no more pairs than that.

    They are a function of the number and the seed alone: the same for every image and layer of one size.
    """
    if count * (count - 1) // 2 <= PER_PATCH * count:
        return None
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(count, (PER_PATCH * count,), generator=generator)
    apart = torch.randint(1, count, (PER_PATCH * count,), generator=generator)
    pairs: Tensor = torch.stack([first, (first + apart) % count]).to(device)
    return pairs


def cosines_of(unit: Tensor, pairs: Tensor) -> Tensor:
    """Return the cosines of pairs `(2, M)` of tokens `(B, N, D)` of length 1: `(B, M)`."""
    images, _, width = unit.shape
    parts = pairs.split(max(1, BLOCK_ENTRIES // (images * width)), dim=1)
    found = [(unit[:, part[0]] * unit[:, part[1]]).sum(-1) for part in parts]
    return torch.cat(found, 1).clamp(-1, 1)


def error_of_mean(values: Tensor) -> Tensor:
    """Return the standard error of the mean of independent draws `(B, M)`: `(B,)`, float64."""
    return values.double().std(1) / math.sqrt(values.shape[1])


def error_of_share_mean(values: Tensor, kept: Tensor) -> Tensor:
    """Return the standard error of the mean of those of `(B, M)` independent draws that are `kept`: `(B,)`, float64."""
    number = kept.sum(1).double()
    mean = (values.double() * kept).sum(1) / number
    squares = ((values.double() - mean[:, None]).square() * kept).sum(1)
    error: Tensor = (squares / (number - 1) / number).sqrt()
    return error


def error_of_quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """Return the standard error of quantiles of independent draws `(B, M)`: `(B, K)`, float64.

    Half the distance between the quantiles one standard error of the share below and above (Woodruff 1952), which needs
    no density.
    """
    apart = (shares * (1 - shares) / values.shape[1]).sqrt()
    ends = torch.cat([shares - apart, shares + apart]).clamp(0, 1)
    low, high = torch.stack([row.double().quantile(ends) for row in values]).chunk(2, dim=1)
    return (high - low) / 2
