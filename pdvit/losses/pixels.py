"""The class loss of a segmentation."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255
"""The label of pixels that have no class."""


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the cross-entropy summed over the pixels that have a class, divided by the number of all pixels.

    As in mmsegmentation: an image whose pixels are mostly ignored counts less. So a batch has the same loss however it
    is divided into parts, and one without any class has loss 0, with gradient 0.

    Args:
        logits: `(B, C, H, W)`, at the size of the masks.
        masks: class indices `(B, H, W)`, 255 where there is none.
    """
    if torch.are_deterministic_algorithms_enabled():  # of images, torch has no such kernel on a GPU
        logits, masks = logits.movedim(1, -1).flatten(0, -2), masks.flatten()
    return F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="sum") / masks.numel()
