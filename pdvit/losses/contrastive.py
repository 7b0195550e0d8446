"""The contrastive term: a patch of the last layer should match its own patch of the first layer."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.config.schema import VARIANTS
from pdvit.errors import UserError
from pdvit.losses.terms import check_variant
from pdvit.similarity import at_least_float32, unit_tokens

# Of the released code: side of the window of its local negative, and its guard inside the logarithm.
WINDOW = 7
EPS = 1e-8


def contrastive_loss(
    first: Tensor,
    last: Tensor,
    variant: str = "paper",
    detach_first: bool | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Return L_con of arXiv 2104.12753 in one of its forms, averaged over patches and images, `(B, N, D)`.

    With f and l the patches of the first and last layer, and m_i a mean of the last layer's patches:

    - `paper` (v3): -log( exp(f_i . l_i) / (exp(f_i . l_i) + exp(f_i . m_i)) ), m_i over the patches other than i. That
      is softplus(f_i . (m_i - l_i)), the form computed here.
    - `v1`: the same with m_i over all patches, i included: its argument is v3's times (n - 1) / n.
    - `released`: one more negative, f_i . c_i, with c_i the mean of the other patches of the 7 x 7 window around i.
      Zeros stand beyond the border and still count among the 48, so that there the negative is weaker. Of the softmax
      of the three, -log(p_i + 1e-8) is taken, with p_i that of f_i . l_i: the guard is theirs, and bounds the loss at
      18.42. From ChengyueGongR/PatchVisionTransformer, deit/models.py.
    - `diverse-vit`: as `paper`, with f and l scaled to length 1 (VITA-Group/Diverse-ViT, reg.py).

    `detach_first` stops the gradient at the first layer; unset: yes, as the released code does (for `paper` and `v1`
    our choice), but not under `diverse-vit`. `grid`, the rows and columns of the patches, is read by `released` only;
    unset: a square. UserError if it has not as many places as there are patches.

    If all last patches are equal, the value is ln 2; under `released` ln 3 for a patch with a whole window, and less at
    the border. 0 for a single patch. Only `released` and `diverse-vit` have an upper bound.
    """
    check_variant(variant, VARIANTS, "contrastive_loss(variant=...)")
    count = last.shape[1]
    if detach_first or (detach_first is None and variant != "diverse-vit"):
        first = first.detach()
    if variant == "diverse-vit":
        first, last = unit_tokens(first), unit_tokens(last)
    first, last = at_least_float32(first), at_least_float32(last)
    if count < 2:
        return (last * 0).sum() + (first * 0).sum()
    # m_i - l_i = (sum_j l_j - n l_i) / (n - 1) = n / (n - 1) * (mean - l_i): elementwise, so autocast leaves it alone
    difference = last.mean(1, keepdim=True) - last
    if variant != "v1":
        difference = difference * (count / (count - 1))
    negative = (first * difference).sum(-1)
    if variant != "released":
        return F.softplus(negative).mean()
    local = (first * (_local_mean(last, grid) - last)).sum(-1)
    logits = torch.stack((torch.zeros_like(negative), negative, local), -1)  # minus the positive one
    return -(logits.softmax(-1)[..., 0] + EPS).log().mean()


def _local_mean(tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Return the mean of the other tokens of the window around each, `(B, N, D)`; zeros beyond the border count too."""
    count = tokens.shape[1]
    rows, columns = grid or (math.isqrt(count),) * 2
    if rows * columns != count:
        what = f"{count} patches {'form no square' if grid is None else f'do not fill a grid of {rows} x {columns}'}"
        raise UserError(what, "contrastive_loss(grid=...)", "pass grid=(rows, columns) of the patches")
    others = WINDOW**2 - 1
    maps = tokens.transpose(1, 2).unflatten(-1, (rows, columns))
    total = F.avg_pool2d(maps, WINDOW, stride=1, padding=WINDOW // 2, divisor_override=others)
    return total.flatten(2).transpose(1, 2) - tokens / others
