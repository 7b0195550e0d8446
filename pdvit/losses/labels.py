"""Cross-entropy with labels, of images and patches alike: one class, shares of classes, or any number of classes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.similarity import at_least_float32


def label_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0, multi_label: bool = False) -> Tensor:
    """Return the mean cross-entropy over all images (and patches); of multi-label targets the binary one.

    Args:
        logits: `(..., C)`.
        targets: class indices `(...)` or probabilities `(..., C)`; with `multi_label` `(..., C)`, each in [0, 1].
        smoothing: share of a target that goes to all classes alike (to one half, with `multi_label`).
        multi_label: each class is a question of its own, and the loss is the mean over them too.

    Returns:
        A scalar >= 0, float32 even under autocast (float64 stays).

    Raises:
        UserError: the targets do not fit the logits, or (on the CPU, outside torch.compile) are out of range. A GPU
            would have to be waited for; there torch itself stops at an index out of range.
    """
    logits = at_least_float32(logits)
    check_labels(tuple(logits.shape), targets, multi_label)
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, soft_labels(targets, logits, smoothing, multi_label))
    targets = targets.to(logits.dtype) if targets.ndim == logits.ndim else targets.long()
    rows = targets.flatten(0, logits.ndim - 2)
    return F.cross_entropy(logits.flatten(0, -2), rows, label_smoothing=smoothing)


def soft_labels(targets: Tensor, logits: Tensor, smoothing: float, multi_label: bool) -> Tensor:
    """Return targets as smoothed probabilities, of the shape and type of the logits."""
    classes = logits.shape[-1]
    soft = targets if targets.ndim == logits.ndim else F.one_hot(targets.long(), classes)
    soft = soft.to(logits.dtype)
    return soft + smoothing * ((0.5 if multi_label else 1 / classes) - soft)


def label_entropy(soft: Tensor, multi_label: bool) -> Tensor:
    """Return the mean entropy of probabilities `(..., C)`: the least that their cross-entropy can be."""
    if multi_label:
        return -(torch.xlogy(soft, soft) + torch.xlogy(1 - soft, 1 - soft)).mean()
    return -torch.xlogy(soft, soft).sum(-1).mean()


def check_labels(shape: tuple[int, ...], targets: Tensor, multi_label: bool) -> None:
    """Raise UserError where targets do not fit logits `(..., C)`; their values are looked at on the CPU only."""
    where, classes = "Objective(...)(output, targets, patch_targets)", shape[-1]
    indices = targets.shape == shape[:-1] and not targets.is_floating_point()
    if not (indices and not multi_label) and targets.shape != shape:
        wanted = "" if multi_label else f"class indices {shape[:-1]}, or "
        raise UserError(
            f"targets of shape {tuple(targets.shape)} ({targets.dtype}) for logits of shape {shape}",
            where,
            f"pass {wanted}a number from 0 to 1 for each class, {shape}",
        )
    if torch.compiler.is_compiling() or targets.device.type != "cpu" or not targets.numel():
        return
    if targets.ndim > 2 and targets.stride(1) == 0:  # all patches share the image's: look at one
        targets = targets[:, :1]
    low, high = (edge.item() for edge in targets.aminmax())
    if not 0 <= low <= high <= (classes - 1 if indices else 1):  # a target that is no number fails too
        raise UserError(
            f"targets from {low:g} to {high:g} for {classes} classes",
            where,
            f"number the classes from 0 to {classes - 1}" if indices else "a share of a class is from 0 to 1",
        )
