"""A source: splits over one list of classes, with their images in memory or read on demand."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

# Images whose sizes are described, and names of a list that are printed.
SAMPLED, LISTED = 32, 5


@dataclass(frozen=True)
class ArraySplit:
    """A small split held in memory: uint8 images `(N, 3, H, W)` and class indices `(N,)`."""

    images: Tensor
    labels: Tensor
    decoded: bool = False
    """Whether these were image files, which are cropped and flipped by default."""

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Return an image."""
        return Image.fromarray(self.images[index].permute(1, 2, 0).cpu().numpy())

    def name(self, index: int) -> str:
        """Return a name for messages."""
        return f"image {index + 1}"

    def take(self, chosen: Tensor) -> "ArraySplit":
        """Return the samples at these indices."""
        return ArraySplit(self.images[chosen], self.labels[chosen], self.decoded)

    def hash(self) -> str:
        """Return a hash of labels and pixels."""
        return _digest(self.labels, [self.images.numpy().tobytes()])


class LazySplit(ABC):
    """A split whose images are read on demand, by index and in any process; it holds paths, not open files."""

    labels: Tensor
    """Class indices, `(N,)`."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return an image whose header is read and whose pixels may not be; raises the errors of its decoder."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the location of the image, for messages."""

    @abstractmethod
    def key(self, index: int) -> str:
        """Return the name of the image without the location of the set, which may move or be packed."""

    @abstractmethod
    def take(self, chosen: Tensor) -> Self:
        """Return the samples at these indices."""

    def hash(self) -> str:
        """Return a hash of labels and names."""
        keys = (self.key(index) for index in range(len(self)))
        return _digest(self.labels, (f"{key}/".encode(errors="surrogateescape") for key in keys))


@dataclass(frozen=True)
class FileSplit(LazySplit):
    """A split of image files."""

    paths: list[Path]
    labels: Tensor

    def open(self, index: int) -> Image.Image:
        """Open a file as an image."""
        if self.paths[index].is_fifo():
            raise ValueError("it is a pipe, not a file")  # opening it would block
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        """Return the path."""
        return str(self.paths[index])

    def key(self, index: int) -> str:
        """Return the file's name."""
        return self.paths[index].name

    def take(self, chosen: Tensor) -> "FileSplit":
        """Return the files at these indices."""
        return FileSplit([self.paths[index] for index in chosen.tolist()], self.labels[chosen])


Split = ArraySplit | LazySplit


def subsample(split: Split, count: int) -> Split:
    """Return at most `count` samples of a split, spread evenly."""
    if len(split) <= count:
        return split
    return split.take(torch.linspace(0, len(split) - 1, count).round().long())


@dataclass(frozen=True)
class Source:
    """Splits by role (train, val and possibly test) over one list of classes, with notes for the user."""

    name: str
    classes: list[str]
    splits: Mapping[str, Split] = field(repr=False)
    notes: tuple[str, ...] = ()
    palette: list[tuple[int, int, int]] | None = None
    """A colour for each class, if pixels are labelled."""

    @property
    def final_split(self) -> str:
        """The split of the closing numbers: test if there is one, so that settings are not chosen on it."""
        return "test" if "test" in self.splits else "val"

    def fingerprint(self) -> dict[str, Any]:
        """Return what a resumed run compares: classes, counts, and a hash of names or pixels by split."""
        return {"classes": len(self.classes)} | {
            name: {"images": len(split), "hash": split.hash()} for name, split in self.splits.items()
        }

    def describe(self) -> str:
        """Return a line with classes, images and their sizes, then a line for each note."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        sizes = describe_sizes(self.splits["train"])
        lines = [f"{self.name}: {len(self.classes)} classes, images: {counts}{sizes}", *self.notes]
        return "\n".join(map(printable, lines))

    def noting(self, *notes: str) -> "Source":
        """Return the source with more notes; empty ones are dropped."""
        return replace(self, notes=(*self.notes, *(note for note in notes if note)))


def _digest(labels: Tensor, parts: Iterable[bytes]) -> str:
    digest = sha256(labels.numpy().tobytes())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def describe_sizes(split: Split) -> str:
    """Describe the image sizes, from the headers of a few images spread evenly over the split."""
    if isinstance(split, ArraySplit):
        sizes = [(split.images.shape[-1], split.images.shape[-2])]
    else:
        few = subsample(split, SAMPLED)
        sizes = [size for index in range(len(few)) if (size := image_size(few, index))]
    if not sizes:
        return ""
    widths, heights = sorted(width for width, _ in sizes), sorted(height for _, height in sizes)
    least, most = f"{widths[0]}x{heights[0]}", f"{widths[-1]}x{heights[-1]}"
    return f"; {least} pixels" if least == most else f"; from {least} to {most} pixels in {len(sizes)} of them"


def image_size(split: Split, index: int) -> tuple[int, int] | None:
    """Return width and height, or None for a bad image, which is reported when it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with split.open(index) as image:
                return image.size
    except Exception:  # decoders raise nearly anything on a damaged file
        return None


def some(names: list[str]) -> str:
    """Return the first names of a list, printable."""
    return printable(", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else ""))


def printable(text: str) -> str:
    """Escape what is not printable: file names may hold any bytes, terminal commands among them."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def as_file_name(text: str) -> str:
    """Return a text as part of a file name, with letters of any script, digits, dots, dashes and underscores."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text)
