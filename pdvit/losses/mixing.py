"""The mixing term: after patch-aligned CutMix, every patch predicts the class of its image."""

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pdvit.config.schema import VARIANTS
from pdvit.losses.cross_entropy import check_targets, cross_entropy_loss, smooth_targets
from pdvit.losses.terms import check_variant
from pdvit.similarity import BLOCK_ENTRIES, at_least_float32


def mixing_loss(
    patch_logits: Tensor,
    patch_targets: Tensor,
    variant: str = "paper",
    label_smoothing: float = 0.0,
    multi_label: bool = False,
) -> Tensor:
    """Return L_mix of arXiv 2104.12753, averaged over the images.

    - `paper`, `v1`, `diverse-vit`: the mean cross-entropy of the patches, 1/n sum_i CE(g(h_i^[L]), y_i).
    - `released`: the patches of a region are averaged before the head, and the divergence KL(target || prediction) of
      each region counts by its area. The head is linear, so this is the mean of the region's patch logits; by convexity
      it is at most the `paper` form. A region here is all patches of an image with the same target; theirs are the two
      masks. Left out: their dropout of 0.2 before the head, and their 1e-8 inside the logarithm, which a log-softmax
      does not need. From ChengyueGongR/PatchVisionTransformer, deit/models.py. Takes n^2 numbers per image.

    `patch_logits` `(B, N, C)` is the output of the shared linear head for each patch of the last layer; the other
    arguments are as in `cross_entropy_loss`. The value is ln C for a uniform prediction (ln 2 with `multi_label`).
    """
    check_variant(variant, VARIANTS, "mixing_loss(variant=...)")
    if variant != "released":
        return cross_entropy_loss(patch_logits, patch_targets, label_smoothing, multi_label)
    logits = at_least_float32(patch_logits)
    check_targets(tuple(logits.shape), patch_targets, multi_label)
    soft = smooth_targets(patch_targets, logits, label_smoothing, multi_label)
    if patch_targets.ndim == 2:
        same = patch_targets[:, :, None] == patch_targets[:, None]
    else:
        same = torch.cdist(patch_targets.float(), patch_targets.float(), p=1) == 0
    regions = same.to(logits.dtype)
    # The mean over patches, each with the logits of its region, weights the regions by area.
    with torch.autocast(logits.device.type, enabled=False):
        means = (regions / regions.sum(-1, keepdim=True)) @ logits
    cross_entropy = cross_entropy_loss(means, soft, 0.0, multi_label)
    if multi_label:
        return cross_entropy + (torch.xlogy(soft, soft) + torch.xlogy(1 - soft, 1 - soft)).mean()
    return cross_entropy + torch.xlogy(soft, soft).sum(-1).mean()


def chunked_mixing_loss(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return `mixing_loss(tokens @ weight.T + bias, patch_targets)` without ever holding all the logits.

    A head of many classes has more patch logits than fit into memory. The gradients are computed chunk by chunk in the
    forward pass, where the logits of a chunk exist anyway; so the result can be differentiated only once. Tokens are
    `(B, N, D)`, weight and bias `(C, D)` and `(C,)`. Under autocast the products have its type, the result is float32.
    """
    check_targets((*tokens.shape[:2], len(weight)), patch_targets, multi_label=False)
    loss: Tensor = _Chunked.apply(tokens, weight, bias, patch_targets, label_smoothing)
    return loss


class _Chunked(torch.autograd.Function):
    """Mean cross-entropy of a linear head over all patches."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_targets: Tensor, label_smoothing: float
    ) -> Tensor:
        images, patches, width = tokens.shape
        ctx.patches = images * patches
        total = weight_grad = bias_grad = at_least_float32(tokens.new_zeros(()))
        token_grads: list[list[Tensor]] = []
        # Each chunk has few enough logits; whole images where they fit.
        patch_step = max(1, min(patches, BLOCK_ENTRIES // len(weight)))
        image_step = max(1, BLOCK_ENTRIES // (patches * len(weight)))
        for row, column in product(range(0, images, image_step), range(0, patches, patch_step)):
            image, patch = slice(row, row + image_step), slice(column, column + patch_step)
            chunk = tokens[image, patch].reshape(-1, width)
            outputs = F.linear(chunk, weight, bias)
            half, logits = outputs.dtype == torch.float16, at_least_float32(outputs)
            loss, grad = _cross_entropy(logits, patch_targets[image, patch].flatten(0, 1), label_smoothing)
            total = total + loss
            if not any(ctx.needs_input_grad):
                continue
            grad = grad.to(weight.dtype)  # under autocast the weights are float32, and the products have its type
            if half:  # a sum over patches that float16 could not hold
                with torch.autocast(grad.device.type, enabled=False):
                    weight_grad = weight_grad + grad.T.float() @ chunk.float()
            else:
                weight_grad = weight_grad + grad.T @ chunk
            bias_grad = bias_grad + grad.sum(0)
            if column == 0:
                token_grads.append([])
            token_grads[-1].append((grad @ weight).view(*tokens[image, patch].shape))
        if token_grads:
            rows = torch.cat([torch.cat(row, 1) for row in token_grads])
            ctx.save_for_backward(rows, weight_grad, bias_grad)
            ctx.dtypes = tokens.dtype, weight.dtype, None if bias is None else bias.dtype
        mean: Tensor = total / ctx.patches
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The division comes last: in half precision the small gradients of many patches would vanish.
        scale = grad / ctx.patches
        saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*((tensor * scale).to(dtype) if needed else None for tensor, dtype, needed in saved), None, None)


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the sum over rows of the cross-entropy, and its derivative by the logits `(M, C)`."""
    logs = F.log_softmax(logits, -1)
    if targets.ndim == 2:
        targets = (1 - label_smoothing) * targets + label_smoothing / logs.shape[1]
        return -(targets * logs).sum(), targets.sum(1, keepdim=True) * logs.exp() - targets
    index = targets[:, None]
    loss = (label_smoothing - 1) * logs.gather(1, index).sum()
    if label_smoothing:
        loss = loss - label_smoothing * logs.mean(1).sum()
    grad = logs.exp_().scatter_add_(1, index, logs.new_full((len(logs), 1), label_smoothing - 1))
    return loss, grad - label_smoothing / logs.shape[1] if label_smoothing else grad
