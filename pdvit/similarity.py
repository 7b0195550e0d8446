"""P, the patch similarity: the one definition that the cosine term, the telemetry and the analysis share.

P(h) = 1 / (n (n - 1)) * sum over i != j of |cos(h_i, h_j)|   (arXiv 2104.12753, v3), without prefix tokens
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pdvit.errors import UserError

# A token without a larger entry has no direction: its cosines and its gradient are 0.
SHORTEST = 1e-12
# Entries of a Gram matrix, or logits of patches, that exist at one moment: 16 MB of float32.
BLOCK_ENTRIES = 4 * 2**20
Pairs = tuple[Tensor, Tensor, Tensor]  # i and j, each `(K,)`, and cosines `(B, K)`


def patch_similarity(tokens: Tensor, signed: bool = False, pairs: Iterable[Pairs] | None = None) -> Tensor:
    """Return P of every image `(B,)` from patch tokens `(B, N, D)`: the mean of |cos| over pairs of different patches.

    It is exact for any N; memory grows with N * D only. Float32 (float64 for float64 tokens), in [0, 1]; 0 for a single
    patch. `signed`: of cos instead of |cos| (the measure of v1 of the paper), in O(N D), in [-1/(N-1), 1]. `pairs` are
    the blocks of `pair_cosines`, if the caller has them already; then P has no gradient.
    """
    if tokens.ndim != 3:
        what = f"patch tokens have three axes (image, patch, width), not the shape {tuple(tokens.shape)}"
        tip = "pass (B, N, D); flatten a map (B, D, H, W) with tokens.flatten(2).transpose(1, 2)"
        raise UserError(what, "patch_similarity(tokens)", tip)
    count = tokens.shape[1]
    if count < 2:
        return (unit_tokens(tokens) * 0).sum((1, 2))  # no pairs; still a function of the tokens, so backward works
    if signed:
        unit = unit_tokens(tokens)
        total = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))  # |sum of u|^2 without i = j
    elif pairs is None and tokens.requires_grad and torch.is_grad_enabled():
        total = _AbsoluteCosines.apply(tokens)
    else:
        pairs = pair_cosines(_normalize(tokens)[0]) if pairs is None else pairs
        total = 2 * torch.stack([cosines.abs().sum(1) for _, _, cosines in pairs]).sum(0)
    return total / (count * (count - 1))


def row_blocks(tokens: Tensor, least: int = 1) -> list[slice]:
    """Return at least so many slices of the patches of `(B, N, D)`; products with all have up to `BLOCK_ENTRIES`."""
    images, count = tokens.shape[:2]
    rows = max(1, min(-(-count // least), BLOCK_ENTRIES // max(1, images * count)))
    return [slice(start, start + rows) for start in range(0, count, rows)]


def pair_cosines(unit: Tensor) -> Iterator[Pairs]:
    """Yield blocks of the pairs i < j of unit tokens `(B, N, D)`, in order: i and j, each `(K,)`, and cosines `(B, K)`.

    Three blocks or more, as each begins at its own diagonal: of the matrix of all products, a third is not computed.
    """
    for rows in row_blocks(unit, 3):
        with torch.autocast(unit.device.type, enabled=False):  # it would round the cosines to bf16
            block = unit[:, rows] @ unit[:, rows.start :].transpose(1, 2)
        _, down, across = block.shape
        i, j = torch.triu_indices(down, across, 1, dtype=torch.int32, device=unit.device)  # half the memory of int64
        cosines = block.flatten(1).index_select(1, torch.add(j, i, alpha=across))
        yield i + rows.start, j + rows.start, cosines.clamp_(-1, 1)


def unit_tokens(tokens: Tensor) -> Tensor:
    """Scale every token of `(..., D)` to length 1, in float32 (float64 stays) even under autocast.

    A token without direction becomes 0. In float16, tokens below 6e-5 have no gradient, because it would overflow.
    """
    return _Unit.apply(tokens)  # type: ignore[no-any-return]


def _normalize(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens at length 1, and what scales the gradient of each, `(..., 1)`: 1 / length, or 0 without one."""
    wide = at_least_float32(tokens)
    # The largest entry becomes 1 first: the square of a large or small one is infinite or 0.
    largest = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    scale = torch.where(largest <= SHORTEST, 0, 1 / largest)  # with <=, a token that is not a number stays one
    unit = wide * scale
    scale_to_one = 1 / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(1)
    if tokens.dtype == torch.float16:
        scale = torch.where(largest < torch.finfo(tokens.dtype).tiny, 0, scale)
    return unit * scale_to_one, scale * scale_to_one  # in place, torch 2.11 compiles wrong gradients


def at_least_float32(tokens: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others as they are."""
    return tokens if tokens.dtype == torch.float64 else tokens.float()


class _Unit(torch.autograd.Function):
    """Tokens u = h / |h| at length 1; the gradient g of u becomes (g - (g . u) u) / |h|."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        unit, scale = _normalize(tokens)
        ctx.save_for_backward(unit, scale)
        ctx.dtype = tokens.dtype
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, scale = ctx.saved_tensors
        along = (grad * unit).sum(-1, keepdim=True)
        return torch.addcmul(grad, along, unit, value=-1).mul_(scale).to(ctx.dtype)


class _AbsoluteCosines(torch.autograd.Function):
    """Sum of |u_i . u_j| over i != j, per image.

    With s_ij = sign(u_i . u_j) off the diagonal and p_i = sum over j of s_ij u_j, the sum is that of p_i . u_i, and its
    gradient towards h_i is 2 (p_i - (p_i . u_i) u_i) / |h_i|. Both are computed in the forward pass, where each block
    of cosines exists anyway, so backward is one multiplication.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        unit, scale = _normalize(tokens)
        total, slopes = unit.new_zeros(len(tokens)), []
        # Autocast would round the cosines to bf16 before they are summed.
        with torch.autocast(unit.device.type, enabled=False):
            for rows in row_blocks(tokens):
                block = unit[:, rows]
                cosines = block @ unit.transpose(1, 2)
                cosines.diagonal(offset=rows.start, dim1=1, dim2=2).zero_()
                pull = cosines.sign_() @ unit
                along = (pull * block).sum(-1, keepdim=True)
                total = total + along.sum((1, 2))
                # no slice of one tensor: torch 2.11 compiles that to a gradient of 0
                slopes.append(pull.addcmul_(along, block, value=-1))
        ctx.save_for_backward(slopes[0] if len(slopes) == 1 else torch.cat(slopes, 1), 2 * scale)
        ctx.dtype = tokens.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        slope, scale = ctx.saved_tensors
        gradient: Tensor = slope * (grad[:, None, None] * scale)
        return gradient.to(ctx.dtype)
