"""What a group of metrics is: a function of the patches of one layer, and what each of its numbers means."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pdvit.analysis.metrics.sample import cosines_of
from pdvit.errors import UserError
from pdvit.similarity import at_least_float32, patch_similarity, unit_tokens

# Below this share of the whole, what is left of float32 tokens after a subtraction is rounding, and counts as nothing.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Definition:
    """What a number means: one row of the table in docs/analyze.md."""

    text: str
    range: str
    random: str
    identical: str
    bias: str
    source: str


@dataclass(frozen=True)
class Group:
    """Metrics that are measured together.

    Attributes:
        of: function from what is measured (`Patches`, or the attention of a block) to named values: one per image,
            `(B,)`, for the table, or a curve per image, `(B, K)`, whose mean over images goes to a file. Of sampled
            pairs, `error/NAME` is the standard error of a value, `(B,)`.
        columns: the names in the table, and what they mean.
        curves: the names of the curves, and what they are.
        shown: which columns a terminal shows, and their short headings.
    """

    of: Callable[[Any], dict[str, Tensor]]
    columns: Mapping[str, Definition]
    curves: Mapping[str, str] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)


class Patches:
    """The patch tokens of one layer for one batch, with what several metrics need of them, computed once.

    Args:
        tokens: `(B, N, D)`.
        image: height and width of the images, in pixels.
        first: tokens of length 1 of the layer that drift is measured from, where this layer can be compared with it.
        pairs: which pairs of patches stand for all, `(2, M)`; None for all of them.
    """

    def __init__(
        self,
        tokens: Tensor,
        image: tuple[int, int] = (1, 1),
        first: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> None:
        self.tokens = at_least_float32(tokens)
        self.image = image
        self.first = first
        self.pairs = pairs

    @cached_property
    def lengths(self) -> Tensor:
        """Length of every token, `(B, N)`."""
        found: Tensor = torch.linalg.vector_norm(self.tokens, dim=-1)
        return found

    @cached_property
    def unit(self) -> Tensor:
        """Tokens of length 1, `(B, N, D)`."""
        return unit_tokens(self.tokens)

    @cached_property
    def cosines(self) -> Tensor:
        """Cosine of every sampled pair, `(B, M)`."""
        assert self.pairs is not None
        return cosines_of(self.unit, self.pairs)

    @cached_property
    def similarity(self) -> Tensor:
        """P of every image, `(B,)`."""
        return patch_similarity(self.tokens) if self.pairs is None else self.cosines.abs().double().mean(1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_of(self.tokens.shape[1], self.image)


def grid_of(count: int, image: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of `count` patches that fill an image; UserError where they are no such grid."""
    height, width = image
    rows = max(1, round((count * height / width) ** 0.5))
    if count % rows:
        raise UserError(
            f"{count} patches are no grid of the shape of a {height}x{width} image",
            "analyze(metrics=...)",
            "leave out spectrum, attention and --explore, or use images that the patches fill",
        )
    return rows, count // rows
