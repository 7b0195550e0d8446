"""The gram term: the similarities of the patches should stay those of an anchor, the model that the run begins from."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pdvit.config.schema import GRAM_VARIANTS
from pdvit.errors import UserError
from pdvit.losses.terms import check_variant
from pdvit.similarity import row_blocks, unit_tokens


def gram_loss(last: Tensor, anchor: Tensor, variant: str = "paper") -> Tensor:
    """Return the mean squared difference of the cosines of patches `(B, N, D)` and of an anchor's, `(B, N, D')`.

    DINOv3 (arXiv 2508.10104) has L_Gram = |X_s X_s^T - X_g X_g^T|_F^2, with the patches of an image at length 1 as the
    rows of X_s (last) and X_g (anchor). That is a sum over n^2 pairs. Here it is divided by n^2, the diagonal included,
    and averaged over the images: the mean squared error of the released code. So a weight has the same meaning at any
    grid.

    - `paper`: this.
    - `remove-neg`: negative cosines of both count as 0; those of last have no gradient.
    - `remove-only-teacher-neg`: negative cosines of the anchor count as 0, and those of last stay, as their code runs.
      It means to clear those of last at the same pairs too, but clears the anchor's first.
    - `batch`: `img_level` is off: the pairs are those of all patches in the forward pass. So the value depends on the
      number of its images.

    The variants other than `paper` are options of the released code (facebookresearch/dinov3), which uses none of them
    in its recipe. No gradient flows into the anchor. Float32 even under autocast (float64 stays); no n x n matrix is
    kept. The value is in [0, 4]: 0 if all cosines agree. UserError if the anchor has other images or patches.
    """
    check_variant(variant, GRAM_VARIANTS, "gram_loss(variant=...)")
    if last.shape[:2] != anchor.shape[:2]:
        what = f"an anchor of {tuple(anchor.shape[:2])} (images, patches) for tokens of {tuple(last.shape[:2])}"
        raise UserError(what, "gram_loss(last, anchor)", "run the anchor on the same images, with the same patch grid")
    unit, target = unit_tokens(last), unit_tokens(anchor.detach())
    if variant == "batch":
        unit, target = unit.flatten(0, 1)[None], target.flatten(0, 1)[None]
    total: Tensor = _SquaredDifferences.apply(unit, target, variant)
    return total / (unit.shape[0] * unit.shape[1] ** 2)


class _SquaredDifferences(torch.autograd.Function):
    """Sum of D_ij^2 over all pairs and images, with D = U U^T - T T^T of unit tokens U and targets T.

    D is symmetric, so the gradient towards u_i is 4 sum_j D_ij u_j. Both are computed in the forward pass, where each
    block of D exists anyway. The closed form in D x D matrices would cancel if U is near T, as it is in training.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, target: Tensor, variant: str) -> Tensor:
        total, slopes = unit.new_zeros(()), []
        # Autocast would round the cosines to bf16 before they are compared.
        with torch.autocast(unit.device.type, enabled=False):
            for rows in row_blocks(unit):
                cosines = unit[:, rows] @ unit.transpose(1, 2)
                targets = (target[:, rows] @ target.transpose(1, 2)).to(unit.dtype)
                if variant in ("remove-neg", "remove-only-teacher-neg"):
                    targets = targets.clamp_min(0)
                difference = (cosines.clamp_min(0) if variant == "remove-neg" else cosines) - targets
                total = total + difference.square().sum()
                if ctx.needs_input_grad[0]:
                    if variant == "remove-neg":
                        difference = difference.masked_fill(cosines < 0, 0)
                    slopes.append(difference @ unit)
        if slopes:
            ctx.save_for_backward(slopes[0] if len(slopes) == 1 else torch.cat(slopes, 1))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return 4 * grad * slope, None, None
