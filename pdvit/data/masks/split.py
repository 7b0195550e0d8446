"""Splits whose images have masks; both are read, or made, when they are needed."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pdvit.data.bad_images import BadImage, BadMask
from pdvit.data.masks.table import ClassTable
from pdvit.data.preprocessing import attempt, read_image, strict_decoders
from pdvit.data.sources import FileSplit, LazySplit

Pair = tuple[Image.Image, Tensor]


class MaskSplit(LazySplit):
    """A split whose images have a class for every pixel.

    Its `labels` are each image's own number: no image is of one class.
    """

    flip: float = 0.5
    """How often a training image is mirrored where the user says nothing."""

    @abstractmethod
    def mask(self, index: int) -> Tensor:
        """Return the training id of every pixel, uint8 `(H, W)`: 0 to classes - 1, or 255 (`IGNORED`).

        Raises ValueError that says what is wrong with it, and whatever its decoder does.
        """

    @abstractmethod
    def mask_name(self, index: int) -> str:
        """Return where the mask is, for messages."""


@dataclass(frozen=True)
class MaskFiles(MaskSplit):
    """Image files, and for each a file of its mask, which is read through one table of classes."""

    images: FileSplit
    masks: list[Path]
    table: ClassTable

    @classmethod
    def of(cls, images: list[Path], masks: list[Path], table: ClassTable) -> "MaskFiles":
        """Pair image files with mask files."""
        return cls(FileSplit(images, torch.arange(len(images))), masks, table)

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        """Each image's own number, `(N,)`."""
        return self.images.labels

    def open(self, index: int) -> Image.Image:
        """Open the file of an image."""
        return self.images.open(index)

    def mask(self, index: int) -> Tensor:
        """Read the file of a mask."""
        return self.table.read(self.masks[index])

    def name(self, index: int) -> str:
        """Return the image's path."""
        return self.images.name(index)

    def mask_name(self, index: int) -> str:
        """Return the mask's path."""
        return str(self.masks[index])

    def key(self, index: int) -> str:
        """Return the names of image and mask."""
        return f"{self.images.key(index)}/{self.masks[index].name}"

    def take(self, chosen: Tensor) -> "MaskFiles":
        """Return the pairs at these indices."""
        at = chosen.tolist()
        return MaskFiles.of([self.images.paths[i] for i in at], [self.masks[i] for i in at], self.table)

    def with_table(self, table: ClassTable) -> "MaskFiles":
        """Return the same files, read through another table."""
        return replace(self, table=table)

    def hash(self) -> str:
        """Return what tells these names and this table from others."""
        return sha256(f"{super().hash()} {self.table.identity()}".encode(errors="surrogateescape")).hexdigest()[:16]


def try_pair(split: MaskSplit, index: int) -> Pair | BadImage:
    """Decode an image `(W, H)` and its mask, or say why one of them can't be used."""
    mask = try_mask(split, index)
    if isinstance(mask, BadImage):
        return mask
    with strict_decoders():
        image = attempt(split, index, lambda: read_image(split.open(index)))
    if isinstance(image, BadImage):
        return image
    return wrong_size(split, index, image.size, mask) or (image, mask)


def try_mask(split: MaskSplit, index: int) -> Tensor | BadMask:
    """Read a mask, or say why it can't be used."""
    with strict_decoders():
        mask = attempt(split, index, split.mask, index)
    return BadMask(split.mask_name(index), mask.reason) if isinstance(mask, BadImage) else mask


def wrong_size(split: MaskSplit, index: int, size: tuple[int, int], mask: Tensor) -> BadMask | None:
    """Say that a mask has another size than its image, where it has."""
    height, width = mask.shape
    if (width, height) == size:
        return None
    return BadMask(split.mask_name(index), f"it is {width}x{height}, its image {size[0]}x{size[1]}")
