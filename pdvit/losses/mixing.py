"""The mixing term: after patch-aligned CutMix, every patch should still tell which image it came from."""

import torch
from torch import Tensor

from pdvit.losses.labels import check_labels, label_entropy, label_loss, soft_labels
from pdvit.losses.variants import VARIANTS, check_variant
from pdvit.similarity import at_least_float32


def mixing_loss(
    patch_logits: Tensor,
    patch_targets: Tensor,
    variant: str = "paper",
    label_smoothing: float = 0.0,
    multi_label: bool = False,
) -> Tensor:
    """Return L_mix of arXiv 2104.12753 in one of its forms, averaged over the images.

    - `paper`, `v1`, `diverse-vit`: the mean cross-entropy of the patches, 1/n sum_i CE(g(h_i^[L]), y_i).
    - `released`: the patches of a region are averaged before the head, and the divergence KL(target || answer) of each
      region counts by its area. The head is linear, so this is the mean of the region's patch logits; by convexity it
      is at most the `paper` form. A region here is all patches of an image with the same target; theirs are the two
      masks. Left out: their dropout of 0.2 before the head, and their 1e-8 inside the logarithm, which a log-softmax
      does not need. From ChengyueGongR/PatchVisionTransformer, deit/models.py. Takes n^2 numbers per image.

    Args:
        patch_logits: `(B, N, C)`, the shared linear head's answer for each patch of the last layer.
        patch_targets: class of each patch, indices `(B, N)` or probabilities `(B, N, C)`.
        variant: one of the above.
        label_smoothing: share of each target that goes to all classes alike (to one half, with `multi_label`).
        multi_label: targets `(B, N, C)` of which each class is a question of its own: binary cross-entropy.

    Returns:
        A scalar >= 0, ln C for a head that knows nothing (ln 2 with `multi_label`). Float32 even under autocast.

    Raises:
        UserError: there is no such variant, or the targets do not fit or are out of range (see `label_loss`).
    """
    check_variant(variant, VARIANTS, "mixing_loss(variant=...)")
    if variant != "released":
        return label_loss(patch_logits, patch_targets, label_smoothing, multi_label)
    logits = at_least_float32(patch_logits)
    check_labels(tuple(logits.shape), patch_targets, multi_label)
    soft = soft_labels(patch_targets, logits, label_smoothing, multi_label)
    # The mean over patches, each with its region's logits, weighs the regions by area.
    answers = region_means(logits, patch_targets)
    return label_loss(answers, soft, 0.0, multi_label) - label_entropy(soft, multi_label)


def region_means(values: Tensor, targets: Tensor) -> Tensor:
    """Give each patch the mean of `values` `(B, N, C)` over its region: the patches of the image with its target."""
    if targets.ndim == 2:
        same = targets[:, :, None] == targets[:, None]
    else:
        same = torch.cdist(targets.float(), targets.float(), p=1) == 0
    share = same.to(values.dtype)
    with torch.autocast(values.device.type, enabled=False):
        return (share / share.sum(-1, keepdim=True)) @ values
