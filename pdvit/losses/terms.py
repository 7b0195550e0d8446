"""The terms of the last layer's tokens `(B, N, D)`, and the schedules of all terms."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdvit.config.schema import VARIANTS
from pdvit.errors import UserError, closest
from pdvit.similarity import patch_similarity, row_blocks, unit_tokens

# DINOv2's epsilon, added in quadrature to a distance.
EPS = 1e-8


@dataclass(frozen=True)
class WeightSchedule:
    """The factor on a weight as a function of the step alone, so a run can be resumed at any step."""

    total: int  # steps of the run
    warmup: int = 0  # steps over which the factor rises linearly from 0 to 1, from the start
    decay: int = 0  # steps over which it falls linearly from 1 to 0, up to the end of the run
    until: int | None = None  # step from which on it is 0

    def __call__(self, step: int) -> float:
        """Return the factor of step 0, 1, ...: the product of the parts."""
        if self.until is not None and step >= self.until:
            return 0.0
        rise = min(1.0, step / self.warmup) if self.warmup else 1.0
        fall = min(1.0, max(0.0, (self.total - step) / self.decay)) if self.decay else 1.0
        return rise * fall


def check_variant(variant: str, known: Sequence[str], where: str) -> None:
    """Raise UserError if a term has no variant of this name."""
    if variant not in known:
        tip = closest(variant, known)
        if variant in VARIANTS:
            tip = f"choose from {', '.join(known)}, or leave the term off"
        raise UserError(f"there is no variant '{variant}' here", where, tip)


def cosine_loss(last: Tensor, variant: str = "paper") -> Tensor:
    """Return the mean cosine of the patches `(B, N, D)` of an image, averaged over the images.

    With u_i the patches scaled to length 1:

    - `paper`: 1/(n(n-1)) sum over i != j of |u_i . u_j|, that is P(h^[L]) of arXiv 2104.12753, v3.
    - `v1`: the same with its sign, in O(n d).
    - `diverse-vit`: 1/n^2 sum over all i, j of u_i . u_j: signed, the diagonal included (VITA-Group/Diverse-ViT,
      reg.py). It is ((n - 1) v1 + 1) / n, and so never negative.

    The released code of the authors has no cosine term. The value is 1 if all patches are parallel (`paper`) or equal
    (the others); for a single patch 0, and 1 with its diagonal.
    """
    check_variant(variant, ("paper", "v1", "diverse-vit"), "cosine_loss(variant=...)")
    if variant == "diverse-vit":
        return unit_tokens(last).mean(1).square().sum(-1).mean()
    return patch_similarity(last, signed=variant == "v1").mean()


def koleo_loss(last: Tensor) -> Tensor:
    """Return -1/n sum_i ln min_{j != i} |u_i - u_j|, u the patches of one image at length 1, averaged over the images.

    The differential entropy of points on the sphere after Kozachenko and Leonenko, as a regulariser: Sablayrolles et
    al., arXiv 1806.03198. DINOv2 (arXiv 2304.07193) applies it, with weight 0.1, to class tokens across images; here it
    compares the patches within an image. As there, neighbours are found without gradient, and a patch of length 0 stays
    0: no neighbour of others unless all their products are negative, and its own is the first of the image. A distance
    r enters as sqrt(r^2 + 1e-16), so value and gradient stay finite.

    The value is 18.42 if all patches are equal, -ln sqrt(2) if they are orthogonal, at least -ln 2; 0 for a single one.
    """
    unit = unit_tokens(last)
    if last.shape[1] < 2:
        return (unit * 0).sum()
    nearest = _nearest(unit.detach())
    difference = unit - unit.gather(1, nearest[..., None].expand_as(unit))
    return -0.5 * (difference.square().sum(-1) + EPS**2).log().mean()


def _nearest(unit: Tensor) -> Tensor:
    """Return the index of the nearest other token of the image for each of `(B, N, D)`: `(B, N)`, in blocks of rows.

    With c_i the tokens minus their mean, |u_i - u_j|^2 = |c_i|^2 - 2 (c_i . c_j - |c_j|^2 / 2). The bracket is
    compared. It does not cancel if the patches are nearly equal, where all products u_i . u_j round to 1.
    """
    present = torch.linalg.vector_norm(unit, dim=-1) > 0  # a token of length 0 counts as orthogonal to all
    centred = unit - unit.mean(1, keepdim=True)
    halves = (centred.square().sum(-1) / 2 + 0.5 * ~present)[:, None]
    columns, found = torch.arange(unit.shape[1], device=unit.device), []
    with torch.autocast(unit.device.type, enabled=False):
        for rows in row_blocks(unit):
            closeness = torch.baddbmm(halves, centred[:, rows], centred.transpose(1, 2), beta=-1)
            # not in place on the diagonal: torch 2.11 compiles that to an argmax of the values before
            closeness = closeness.masked_fill(columns[rows, None] == columns, -math.inf)
            found.append(closeness.argmax(-1))
    first = (columns == 0).long()  # the first other token
    return torch.where(present, torch.cat(found, 1), first)


def spectral_loss(last: Tensor) -> Tensor:
    """Return the purity tr(K^2) of K = U U^T / n, averaged over the images; U `(n, d)` holds the patches at length 1.

    K has trace 1, so its eigenvalues sum to 1, and the purity is the sum of their squares; 1 / purity, the
    participation ratio, counts the directions in use. It is also the mean of the squared cosines of all pairs, the
    diagonal included, and up to constants the soft orthogonality |U U^T - I|^2 of Bansal et al., arXiv 1810.09102. Its
    use as a diversity term is our choice. |U U^T| = |U^T U|, so the smaller of the two is computed, and no eigenvalue.

    The value is in [1 / min(n, d), 1]: 1 if all patches are parallel. Tokens of length 0 lower it, down to 0.
    """
    unit = unit_tokens(last)
    count, width = unit.shape[1:]
    across = unit.transpose(1, 2)
    with torch.autocast(unit.device.type, enabled=False):
        gram = unit @ across if count <= width else across @ unit
    return (gram / count).square().sum((1, 2)).mean()


LAST_LAYER_TERMS: dict[str, Callable[[Tensor], Tensor]] = {"koleo": koleo_loss, "spectral": spectral_loss}
