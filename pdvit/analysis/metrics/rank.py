"""The number of directions that the patches of an image use."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import ROUNDING, Patches


def gram_matrices(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smaller Gram matrix, X X^T or X^T X, of tokens `(..., N, D)`, and that of centred tokens, float64.

    The second is the first with the mean taken out: another product would take as long as the first.
    """
    tokens = tokens.double()
    count, width = tokens.shape[-2:]
    if width < count:
        gram, mean = tokens.mT @ tokens, tokens.mean(-2)
        return gram, gram - count * mean[..., None] * mean[..., None, :]
    gram = tokens @ tokens.mT
    rows = gram.mean(-1, keepdim=True)
    return gram, gram - rows - rows.mT + rows.mean(-2, keepdim=True)


def effective_rank(gram: Tensor) -> Tensor:
    """Return exp of the entropy of sigma / sum of sigma, `(...)`, from a Gram matrix (Roy & Vetterli 2007).

    The sigma are the singular values of the tokens, the roots of its eigenvalues: exact enough in float64. Tokens are
    not centred. Values below 1e-6 of the largest count as 0. Zero tokens give 0.
    """
    finite = gram.nan_to_num(0, 0, 0)  # of other tokens the solver would raise its own error
    values: Tensor = torch.linalg.eigvalsh(finite).clamp_min(0).sqrt()
    values = values * (values > ROUNDING * values[..., -1:])
    total = values.sum(-1, keepdim=True)
    rank: Tensor = torch.special.entr(values / total.where(total > 0, 1)).sum(-1).exp()
    return rank * (total[..., 0] > 0)


def participation_ratio(gram: Tensor, centred: Tensor) -> Tensor:
    """Return (sum of lambda)^2 / sum of lambda^2 of the covariance of tokens, `(...)`, from both Gram matrices.

    The sums are the trace and the squared entries. If centring leaves no more than 1e-6 of the tokens, as of identical
    tokens, the ratio is 0.
    """
    energy, total = (matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in (gram, centred))
    spread = total > ROUNDING**2 * energy
    return (total**2 / centred.square().sum((-2, -1)).where(spread, 1)).where(spread, 0)


def rank_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of rank."""
    gram, centred = gram_matrices(patches.tokens)
    return {"effective_rank": effective_rank(gram), "participation_ratio": participation_ratio(gram, centred)}
