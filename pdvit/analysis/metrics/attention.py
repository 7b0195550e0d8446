"""Where the patches look: entropy, distance, contrast of attention, and its likeness from block to block.

Attention is read between patches: prefix tokens are left out as queries and as keys, and what each patch gives to
patches is scaled to a sum of 1.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pdvit.analysis.metrics.group import Definition, Group, grid_of
from pdvit.similarity import unit_tokens


@dataclass(frozen=True)
class Attention:
    """The attention of one block for one batch.

    Args:
        probabilities: `(B, heads, T, T)`, rows are queries, prefix tokens in front.
        prefix: how many prefix tokens.
        image: height and width of the images, in pixels.
        before: the `rows` of the block before; none for the first.
    """

    probabilities: Tensor
    prefix: int = 0
    image: tuple[int, int] = (1, 1)
    before: Tensor | None = None

    @cached_property
    def rows(self) -> Tensor:
        """Attention between patches, `(B, heads, N, N)`, each row with sum 1."""
        patches = self.probabilities[..., self.prefix :, self.prefix :].float()
        total: Tensor = patches.sum(-1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
        return patches / total


def entropy(rows: Tensor) -> Tensor:
    """Return the mean entropy of the rows of `(B, heads, N, N)`, in nats: `(B, heads)`."""
    parts: Tensor = torch.special.entr(rows)
    return parts.sum(-1).mean(-1)


def distance(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean distance that the rows of `(B, heads, N, N)` look at, in patches: `(B, heads)`."""
    y, x = (places.flatten() for places in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    apart = torch.hypot((y[:, None] - y).float(), (x[:, None] - x).float()).to(rows.device)
    return (rows * apart).sum(-1).mean(-1)


def deviation(rows: Tensor) -> Tensor:
    """Return the standard deviation of each row's N values, mean over the rows of `(B, heads, N, N)`: `(B, heads)`."""
    return rows.std(-1, correction=0).mean(-1)


def likeness(rows: Tensor, before: Tensor) -> Tensor:
    """Return the mean over keys of the cosine between two blocks' columns `(B, heads, N, N)`: `(B, heads)`.

    A column is what a patch gives to all queries; DeepViT's cross-layer similarity (Zhou et al. 2021).
    """
    columns, others = unit_tokens(rows.transpose(-1, -2)), unit_tokens(before.transpose(-1, -2))
    return (columns * others).sum(-1).mean(-1)


def _attention(attention: Attention) -> dict[str, Tensor]:
    rows = attention.rows
    heads = {
        "attention_entropy": entropy(rows),
        "attention_distance": distance(rows, grid_of(rows.shape[-1], attention.image)),
        "attention_std": deviation(rows),
    }
    if attention.before is not None:
        heads["attention_similarity"] = likeness(rows, attention.before)
    curves = {name.removeprefix("attention_"): values for name, values in heads.items()}
    return {name: values.mean(1) for name, values in heads.items()} | curves


ATTENTION = Group(
    _attention,
    {
        "attention_entropy": Definition(
            "the entropy of a patch's attention over the patches (prefix tokens left out, rows scaled to sum 1), in "
            "nats, mean over queries and heads; of blocks only, like the other three",
            "0 to ln n",
            "near ln n (random weights)",
            "ln n",
            "its ceiling is ln n: compare only at equal n",
            "Zhai et al. 2023 (arXiv 2303.06296)",
        ),
        "attention_distance": Definition(
            "the distance on the grid, in patches, between query and key, mean by attention, over queries and heads",
            "0 to the grid's diagonal",
            "that of uniform attention: 7.3 on a grid of 14x14",
            "that of uniform attention",
            "grows with the grid",
            "Dosovitskiy et al. 2021 (in pixels)",
        ),
        "attention_std": Definition(
            "the standard deviation (over n) of a patch's n attention values, mean over queries and heads",
            "0 to √(n-1)/n",
            "near 0 (random weights)",
            "0",
            "falls as 1/n: compare only at equal n",
            "v1 of Gong et al. 2021",
        ),
        "attention_similarity": Definition(
            "the cosine between what a patch gives to all queries in this block and in the block before, by head, mean "
            "over patches and heads; not for block 1",
            "0 to 1",
            "near 1 (random weights: both are near uniform)",
            "1",
            "none known",
            "Zhou et al. 2021, DeepViT (arXiv 2103.11886)",
        ),
    },
    {
        "entropy": "attention_entropy by head, mean over images",
        "distance": "attention_distance by head",
        "std": "attention_std by head",
        "similarity": "attention_similarity by head",
    },
    shown={
        "attention_entropy": "entropy",
        "attention_distance": "distance",
        "attention_std": "row std",
        "attention_similarity": "as before",
    },
)
