"""The tokens of one layer, which all metrics read."""

from functools import cached_property

import torch
from torch import Tensor

from pdvit.errors import UserError
from pdvit.similarity import at_least_float32, patch_similarity, unit_tokens

ROUNDING = 1e-6  # remainders of float32 tokens below this fraction of the whole are rounding errors and count as zero


class Patches:
    """The patch tokens `(B, N, D)` of one layer; values that several metrics need are computed once.

    `image_size` is the height and width of the images, `first` the unit tokens that drift is measured from, if any.
    """

    def __init__(self, tokens: Tensor, image_size: tuple[int, int] = (1, 1), first: Tensor | None = None) -> None:
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

    @cached_property
    def similarity(self) -> Tensor:
        """P of every image, `(B,)`."""
        return patch_similarity(self.tokens)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_of(self.tokens.shape[1], self.image_size)


def grid_of(count: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of `count` patches that fill an image; UserError if they form no such grid."""
    height, width = image_size
    rows = max(1, round((count * height / width) ** 0.5))
    if count % rows:
        what = f"{count} patches form no grid of the shape of a {height}x{width} image"
        tip = "leave out spectrum, attention and --explore, or use images that the patches fill"
        raise UserError(what, "analyze(metrics=...)", tip)
    return rows, count // rows
