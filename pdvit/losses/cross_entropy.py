"""Cross-entropies: of images and patches with any form of labels, and of the pixels of a segmentation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.similarity import at_least_float32

# Label of pixels that have no class.
IGNORED = 255


def cross_entropy_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0, multi_label: bool = False) -> Tensor:
    """Return the mean cross-entropy over images (and patches), float32 even under autocast (float64 stays).

    Targets of logits `(..., C)` are class indices `(...)` or probabilities `(..., C)`. With `multi_label`, every class
    is a binary decision, and the loss is the mean over the classes too. `smoothing` is the fraction of a target that is
    distributed evenly over the classes (with `multi_label` to one half). Raises UserError as `check_targets`.
    """
    logits = at_least_float32(logits)
    check_targets(tuple(logits.shape), targets, multi_label)
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, smooth_targets(targets, logits, smoothing, multi_label))
    targets = targets.to(logits.dtype) if targets.ndim == logits.ndim else targets.long()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(0, logits.ndim - 2), label_smoothing=smoothing)


def smooth_targets(targets: Tensor, logits: Tensor, smoothing: float, multi_label: bool) -> Tensor:
    """Return targets as smoothed probabilities, of the shape and type of the logits."""
    classes = logits.shape[-1]
    soft = (targets if targets.ndim == logits.ndim else F.one_hot(targets.long(), classes)).to(logits.dtype)
    return soft + smoothing * ((0.5 if multi_label else 1 / classes) - soft)


def check_targets(shape: tuple[int, ...], targets: Tensor, multi_label: bool) -> None:
    """Raise UserError if targets do not fit logits of shape `(..., C)`, or are out of range.

    The range is checked on the CPU only, outside torch.compile. On a GPU the check would have to wait for the device;
    there torch itself stops at an index out of range.
    """
    where, classes = "Objective(...)(output, targets, patch_targets)", shape[-1]
    indices = targets.shape == shape[:-1] and not targets.is_floating_point()
    if targets.shape != shape and (multi_label or not indices):
        what = f"targets of shape {tuple(targets.shape)} ({targets.dtype}) for logits of shape {shape}"
        or_indices = "" if multi_label else f"class indices {shape[:-1]}, or "
        few = len(shape) > 2 and targets.ndim > 1 and 0 < abs(targets.shape[1] - shape[1]) <= 8
        tip = "check prefix_tokens of the model, or " if few else ""
        raise UserError(what, where, f"{tip}pass {or_indices}a number from 0 to 1 for each class, {shape}")
    if torch.compiler.is_compiling() or targets.device.type != "cpu" or not targets.numel():
        return
    low, high = (edge.item() for edge in targets.aminmax())
    if not 0 <= low <= high <= (classes - 1 if indices else 1):  # NaN fails too
        tip = f"number the classes from 0 to {classes - 1}" if indices else "a probability is from 0 to 1"
        raise UserError(f"targets from {low:g} to {high:g} for {classes} classes", where, tip)


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the cross-entropy summed over the labelled pixels, divided by the number of all pixels.

    MMSegmentation divides in the same way: an image whose pixels are mostly ignored counts less. So the loss of a batch
    does not depend on how it is split, and a batch without labels has loss 0 and gradient 0. Logits are `(B, C, H, W)`,
    masks `(B, H, W)`.
    """
    if torch.are_deterministic_algorithms_enabled():  # torch has no deterministic kernel for images on a GPU
        logits, masks = logits.movedim(1, -1).flatten(0, -2), masks.flatten()
    return F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="sum") / masks.numel()
