"""Entropy, distance and contrast of the attention between patches, and its similarity from block to block.

Prefix tokens are left out as queries and as keys, and each row is scaled to a sum of 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import grid_of


def patch_rows(probabilities: Tensor, prefix: int) -> Tensor:
    """Return attention between patches, each row scaled to sum 1, from all tokens' `(B, heads, T, T)`."""
    patches = probabilities[..., prefix:, prefix:].float()
    total: Tensor = patches.sum(-1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
    return patches / total


def attention_metrics(rows: Tensor, image_size: Sequence[int], previous: Tensor | None) -> dict[str, Tensor]:
    """Return the metrics of attention: means over heads for the table, values by head `(B, heads)` as curves.

    `rows` are the attention between patches in one block, `(B, heads, N, N)`, `previous` that of the block before.
    """
    grid, count = grid_of(rows.shape[-1], image_size), rows.shape[-1]
    place = torch.arange(count, device=rows.device)
    y, x = place // grid[1], place % grid[1]
    distances = torch.hypot((y[:, None] - y).float(), (x[:, None] - x).float())
    logarithms = rows.clamp_min(torch.finfo(rows.dtype).tiny).log_()
    deviations = torch.linalg.vector_norm(rows - rows.mean(-1, keepdim=True), dim=-1)
    by_head = {
        "entropy": -(logarithms.mul_(rows)).sum((-2, -1)) / count,  # in nats
        "distance": rows.flatten(-2) @ distances.flatten() / count,  # between query and key, in patches
        "std": deviations.mean(-1) / count**0.5,
    }
    if previous is not None:
        # A column is the attention that a patch gets: DeepViT's cross-layer similarity (Zhou et al. 2021).
        own, other = (part.square().sum(-2).sqrt() for part in (rows, previous))
        lengths = own * other
        by_head["similarity"] = ((rows * previous).sum(-2) / lengths.where(lengths > 0, 1)).mean(-1)
    return {f"attention_{name}": values.mean(1) for name, values in by_head.items()} | by_head
