"""The adaptive pooling inside UPerNet's decoder, also with a gradient that is the same each time on a GPU."""

import torch
from torch import Tensor, nn


class Pool(nn.AdaptiveAvgPool2d):
    """Means over a grid of parts: torch's own, or as products where only deterministic kernels are asked for.

    There torch refuses the gradient of its own on a GPU; a CPU does the same, so that it can be proven there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `(B, C, parts, parts)` of maps `(B, C, H, W)`."""
        if not torch.are_deterministic_algorithms_enabled():
            pooled: Tensor = super().forward(input)
            return pooled
        assert isinstance(self.output_size, int)
        down, across = (_shares(side, self.output_size, input) for side in input.shape[2:])
        return down @ input @ across.mT


def with_pools(module: nn.Module) -> None:
    """Replace every square nn.AdaptiveAvgPool2d inside by a `Pool`, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d) and isinstance(child.output_size, int):
            setattr(module, name, Pool(child.output_size))
        else:
            with_pools(child)


def _shares(side: int, parts: int, like: Tensor) -> Tensor:
    """Return what each of `side` places gives to the mean of each part, `(parts, side)`.

    Part i reaches from floor(i side / parts) to ceil((i + 1) side / parts), so parts can overlap.
    """
    part, place = torch.arange(parts, device=like.device)[:, None], torch.arange(side, device=like.device)
    inside = (place >= part * side // parts) & (place < ((part + 1) * side + parts - 1) // parts)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
