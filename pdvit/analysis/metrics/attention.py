"""Entropy, distance and contrast of the attention between patches, and its similarity from block to block.

Prefix tokens are left out as queries and as keys, and each row is scaled to a sum of 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import grid_of
from pdvit.similarity import unit_tokens


@dataclass(frozen=True)
class Attention:
    """The attention between patches in one block, `(B, heads, N, N)`; rows are queries with sum 1."""

    rows: Tensor
    image_size: tuple[int, int] = (1, 1)
    previous: Tensor | None = None  # rows of the previous block


def patch_rows(probabilities: Tensor, prefix: int) -> Tensor:
    """Return attention between patches, each row scaled to sum 1, from all tokens' `(B, heads, T, T)`."""
    patches = probabilities[..., prefix:, prefix:].float()
    total: Tensor = patches.sum(-1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
    return patches / total


def attention_metrics(block: Attention) -> dict[str, Tensor]:
    """Return the metrics of attention: means over heads for the table, values by head `(B, heads)` as curves."""
    grid = grid_of(block.rows.shape[-1], block.image_size)
    y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    distances = torch.hypot((y[:, None] - y).float(), (x[:, None] - x).float()).to(block.rows.device)
    by_head = {
        "entropy": torch.special.entr(block.rows).sum(-1).mean(-1),  # in nats
        "distance": (block.rows * distances).sum(-1).mean(-1),  # between query and key, in patches
        "std": block.rows.std(-1, correction=0).mean(-1),
    }
    if block.previous is not None:
        # A column is the attention that a patch gets: DeepViT's cross-layer similarity (Zhou et al. 2021).
        columns, others = (unit_tokens(rows.transpose(-1, -2)) for rows in (block.rows, block.previous))
        by_head["similarity"] = (columns * others).sum(-1).mean(-1)
    return {f"attention_{name}": values.mean(1) for name, values in by_head.items()} | by_head
