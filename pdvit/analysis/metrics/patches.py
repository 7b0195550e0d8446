"""The tokens of one layer, which all metrics read."""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pdvit.errors import UserError
from pdvit.similarity import BLOCK_ENTRIES, Pairs, at_least_float32, pair_cosines, patch_similarity, unit_tokens

# Percentiles are exact up to this number of patches; above it, they come from a random sample of pairs.
MAX_EXACT_PATCHES = 2048
ROUNDING = 1e-6  # remainders of float32 tokens below this fraction of the whole are rounding errors and count as zero


class Patches:
    """The patch tokens `(B, N, D)` of one layer; values that several metrics need are computed once.

    `image_size` is the height and width of the images, `first` the unit tokens that drift is measured from, if any.
    """

    def __init__(self, tokens: Tensor, image_size: Sequence[int] = (1, 1), first: Tensor | None = None) -> None:
        self.tokens = at_least_float32(tokens)
        self.image_size = image_size
        self.first = first

    @cached_property
    def lengths(self) -> Tensor:
        """Length of every token, `(B, N)`, in float64, where no square of a float32 is infinite or 0."""
        lengths: Tensor = torch.linalg.vector_norm(self.tokens, dim=-1, dtype=torch.float64)
        return lengths

    @cached_property
    def unit(self) -> Tensor:
        """Tokens scaled to length 1, `(B, N, D)`."""
        return unit_tokens(self.tokens)

    def pairs(self) -> Iterable[Pairs]:
        """Return all pairs of patches in the blocks of `pair_cosines`; up to `MAX_EXACT_PATCHES` one, computed once."""
        return [self._pairs] if self.tokens.shape[1] <= MAX_EXACT_PATCHES else pair_cosines(self.unit)

    @cached_property
    def _pairs(self) -> Pairs:
        i, j, cosines = zip(*pair_cosines(self.unit), strict=True)
        return torch.cat(i), torch.cat(j), torch.cat(cosines, 1)

    @cached_property
    def similarity(self) -> Tensor:
        """P of every image, `(B,)`."""
        return patch_similarity(self.tokens, pairs=self.pairs())

    def split(self) -> "list[Patches]":
        """Return parts of the images, so that all pairs of a part, and transforms of its tokens, fit into a block."""
        _, count, width = self.tokens.shape
        images = max(1, BLOCK_ENTRIES // (count * max(count, width)))
        parts = self.tokens.split(images)
        firsts = [None] * len(parts) if self.first is None else self.first.split(images)
        return [Patches(part, self.image_size, first) for part, first in zip(parts, firsts, strict=True)]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_of(self.tokens.shape[1], self.image_size)


def grid_of(count: int, image_size: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of `count` patches that fill an image; UserError if they form no such grid."""
    height, width = image_size
    rows = max(1, round((count * height / width) ** 0.5))
    if count % rows:
        what = f"{count} patches form no grid of the shape of a {height}x{width} image"
        tip = "leave out spectrum, attention and --explore, use other images, or, in Python, pass prefix_tokens"
        raise UserError(what, "--metrics, in Python analyze(metrics=...)", tip)
    return rows, count // rows
