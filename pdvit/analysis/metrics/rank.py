"""How many directions the patches of an image use."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.group import ROUNDING, Definition, Group, Patches


def effective_rank(tokens: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values' shares, `(B,)`, float64: Roy & Vetterli 2007.

    The tokens `(B, N, D)` are taken as they are: not centred, not scaled; the shares are sigma / sum of sigma (not of
    sigma^2). Singular values below 1e-6 of the largest are rounding and count as 0. Zero tokens give 0.
    """
    return torch.stack([_effective_rank(image.double()) for image in tokens])


def participation_ratio(tokens: Tensor) -> Tensor:
    """Return (sum of lambda)^2 / sum of lambda^2 of the covariance of an image's patches, `(B,)`, float64.

    The tokens `(B, N, D)` are centred on their image's mean. 0 where no more than 1e-6 of them is left by that, as of
    identical tokens.
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
    """Return them ascending, from the smaller of the two Gram matrices: in float64 that is exact enough."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values: Tensor = torch.linalg.eigvalsh(small @ small.T)
    return values.clamp_min(0)


def _rank(patches: Patches) -> dict[str, Tensor]:
    return {
        "effective_rank": effective_rank(patches.tokens),
        "participation_ratio": participation_ratio(patches.tokens),
    }


RANK = Group(
    _rank,
    {
        "effective_rank": Definition(
            "exp of the entropy of s/Σs, s the singular values of the n by d tokens as they are (not centred; s, not "
            "s²; s below 1e-6 of the largest counts as 0)",
            "1 to min(n, d); 0 for zero tokens",
            "somewhat below min(n, d): 189 of 196 at n = 196, d = 768",
            "1",
            "capped by n: compare only at equal n and d",
            "Roy & Vetterli 2007",
        ),
        "participation_ratio": Definition(
            "(Σλ)²/Σλ² of the eigenvalues λ of the covariance of an image's tokens (centred; 0 where no more than "
            "1e-6 of the tokens is left)",
            "1 to min(n - 1, d); 0 without spread",
            "(n-1)d/(n+d)",
            "0",
            "low for few patches: of independent tokens (n-1)d/(n+d), never d",
            "Gao et al. 2017 (of neurons)",
        ),
    },
    shown={"effective_rank": "eff. rank", "participation_ratio": "part. ratio"},
)
