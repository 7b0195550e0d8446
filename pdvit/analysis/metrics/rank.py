"""The number of directions that the patches of an image use."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import ROUNDING, Patches


def effective_rank(tokens: Tensor) -> Tensor:
    """Return exp of the entropy of sigma / sum of sigma for an image's tokens `(N, D)`, float64 (Roy & Vetterli 2007).

    Tokens are not centred. Singular values below 1e-6 of the largest count as 0. Zero tokens give 0.
    """
    values = _squared_singular_values(tokens.double()).sqrt()
    values = values[values > ROUNDING * values[-1]]
    return torch.special.entr(values / values.sum()).sum().exp() if len(values) else values.new_zeros(())


def participation_ratio(tokens: Tensor) -> Tensor:
    """Return (sum of lambda)^2 / sum of lambda^2 of the covariance of an image's tokens `(N, D)`, float64.

    If centring leaves no more than 1e-6 of the tokens, as of identical tokens, the ratio is 0.
    """
    tokens = tokens.double()
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
    metrics = {"effective_rank": effective_rank, "participation_ratio": participation_ratio}
    return {name: torch.stack([metric(image) for image in patches.tokens]) for name, metric in metrics.items()}
