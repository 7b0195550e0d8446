"""The mixing term from the tokens themselves, for heads so wide that the logits of all patches would not fit."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses.labels import check_labels
from pdvit.similarity import at_least_float32

# Logits that exist at one moment: 16 MB of float32.
ENTRIES = 4 * 2**20


def chunked_mixing_loss(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return `mixing_loss(tokens @ weight.T + bias, patch_targets)` without ever holding all the logits.

    The gradients are made in the forward pass, part by part, where each part's logits exist anyway; so it can be
    differentiated once only.

    Args:
        tokens: what the head reads, `(B, N, D)`.
        weight: of the linear head, `(C, D)`.
        bias: of the linear head, `(C,)`, or None.
        patch_targets: class of each patch, indices `(B, N)` or probabilities `(B, N, C)` (an expanded view will do).
        label_smoothing: share of each target that is spread over all classes.

    Returns:
        A scalar >= 0 in float32 (float64 tokens: float64); under autocast the products take its type.

    Raises:
        UserError: the shapes do not belong together, or targets (on the CPU, outside torch.compile) are out of range.
    """
    if tokens.ndim != 3 or weight.shape[-1:] != tokens.shape[-1:]:
        raise UserError(
            f"tokens {tuple(tokens.shape)} and a head {tuple(weight.shape)} do not belong together",
            "chunked_mixing_loss(tokens, weight, bias, patch_targets)",
            "pass (B, N, D) and (C, D)",
        )
    check_labels((*tokens.shape[:2], len(weight)), patch_targets, multi_label=False)
    loss: Tensor = _Chunked.apply(tokens, weight, bias, patch_targets, label_smoothing)
    return loss


def _parts(images: int, count: int, classes: int) -> Iterator[tuple[slice, slice]]:
    """Divide images and patches so that each part has few enough logits; whole images where they fit."""
    patches = max(1, min(count, ENTRIES // classes))
    together = max(1, ENTRIES // (count * classes))
    for image in range(0, images, together):
        for patch in range(0, count, patches):
            yield slice(image, image + together), slice(patch, patch + patches)


class _Chunked(torch.autograd.Function):
    """Mean cross-entropy of a linear head over all patches."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_targets: Tensor, label_smoothing: float
    ) -> Tensor:
        images, count, width = tokens.shape
        ctx.patches = images * count
        total = pull_weight = pull_bias = at_least_float32(tokens.new_zeros(()))
        pull_tokens: list[list[Tensor]] = []
        for image, patch in _parts(images, count, len(weight)):
            part = tokens[image, patch].reshape(-1, width)
            scores = F.linear(part, weight, bias)
            half, logits = scores.dtype == torch.float16, at_least_float32(scores)
            loss, slope = _cross_entropy(logits, patch_targets[image, patch].flatten(0, 1), label_smoothing)
            total = total + loss
            if not any(ctx.needs_input_grad):
                continue
            slope = slope.to(weight.dtype)  # under autocast the weights are float32, and the products take its type
            pull_weight = pull_weight + _slope_times(slope, part, exact=half)
            pull_bias = pull_bias + slope.sum(0)
            if patch.start == 0:
                pull_tokens.append([])
            pull_tokens[-1].append((slope @ weight).view(*tokens[image, patch].shape))
        if pull_tokens:
            rows = torch.cat([torch.cat(row, 1) for row in pull_tokens])
            ctx.save_for_backward(rows, pull_weight, pull_bias)
            ctx.dtypes = tokens.dtype, weight.dtype, None if bias is None else bias.dtype
        mean: Tensor = total / ctx.patches
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # the division comes last: in half precision the small slopes of many patches would vanish
        share = grad / ctx.patches
        pulls = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*((pull * share).to(dtype) if needed else None for pull, dtype, needed in pulls), None, None)


def _slope_times(slope: Tensor, part: Tensor, exact: bool) -> Tensor:
    """Return the gradient of the head, not yet divided by the number of patches: a sum that float16 could not hold."""
    if not exact:
        return slope.T @ part
    with torch.autocast(slope.device.type, enabled=False):
        return slope.T.float() @ part.float()


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the sum over rows of the cross-entropy, and its derivative by the logits `(M, C)`."""
    logs = F.log_softmax(logits, -1)
    if targets.ndim == 2:
        targets = (1 - label_smoothing) * targets + label_smoothing / logs.shape[1]
        return -(targets * logs).sum(), targets.sum(1, keepdim=True) * logs.exp() - targets
    right = targets[:, None]
    loss = (label_smoothing - 1) * logs.gather(1, right).sum()
    if label_smoothing:
        loss = loss - label_smoothing * logs.mean(1).sum()
    slope = logs.exp_().scatter_add_(1, right, logs.new_full((len(logs), 1), label_smoothing - 1))
    return loss, slope - label_smoothing / logs.shape[1] if label_smoothing else slope
