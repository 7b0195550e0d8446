"""The number of directions that the patches of an image use."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.group import ROUNDING, Patches


def effective_rank(tokens: Tensor) -> Tensor:
    """Return exp of the entropy of sigma / sum of sigma, `(B,)`, float64 (Roy & Vetterli 2007).

    The tokens `(B, N, D)` are neither centred nor scaled, and sigma is not squared. Singular values below 1e-6 of the
    largest count as 0. Zero tokens give 0.
    """
    return torch.stack([_effective_rank(image.double()) for image in tokens])


def participation_ratio(tokens: Tensor) -> Tensor:
    """Return (sum of lambda)^2 / sum of lambda^2 of the covariance of an image's patches, `(B,)`, float64.

    The tokens `(B, N, D)` are centred on their image's mean. If no more than 1e-6 of them is left, as of identical
    tokens, the ratio is 0.
    """
    return torch.stack([_participation_ratio(image.double()) for image in tokens])


def _effective_rank(tokens: Tensor) -> Tensor:
    values = _squared_singular_values(tokens).sqrt()
    values = values[values > ROUNDING * values[-1]]
    return torch.special.entr(values / values.sum()).sum().exp() if len(values) else tokens.new_zeros(())


def _participation_ratio(tokens: Tensor) -> Tensor:
    values = _squared_singular_values(tokens - tokens.mean(0))
    total = values.sum()
    spread = bool(total > ROUNDING**2 * tokens.square().sum())
    return total**2 / values.square().sum() if spread else tokens.new_zeros(())


def _squared_singular_values(matrix: Tensor) -> Tensor:
    """Return them in ascending order, from the smaller of the two Gram matrices: exact enough in float64."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values: Tensor = torch.linalg.eigvalsh(small @ small.T)
    return values.clamp_min(0)


def rank_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of rank."""
    tokens = patches.tokens
    return {"effective_rank": effective_rank(tokens), "participation_ratio": participation_ratio(tokens)}
