"""Splits, with their images in memory or read on demand, and sources: splits by role over one list of classes."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.randomness import fold
from pdvit.data.sources import WHERE, first_names, printable
from pdvit.errors import UserError

TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES = ("train", "training"), ("val", "validation", "valid"), ("test",)
SPLIT_NAMES = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}
HELD_OUT = 0.1
SAMPLED = 32  # images whose sizes are described


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

    key = name

    def take(self, chosen: Tensor) -> "ArraySplit":
        """Return the samples at these indices."""
        return ArraySplit(self.images[chosen], self.labels[chosen], self.decoded)

    def hash(self) -> str:
        """Return a hash of labels and pixels."""
        return _digest(self.labels, [self.images.numpy().tobytes()])


class LazySplit(ABC):
    """A split whose images are read on demand, by index and in any process; it holds paths, not open files.

    Subclasses are data classes; each of their lists has one item for each sample.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return an image whose header is read and whose pixels may not be; raises the errors of its decoder."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the location of the image, for messages."""

    def key(self, index: int) -> str:
        """Return the name of the image without the location of the set, which may move or be packed."""
        return os.path.basename(self.name(index))

    def take(self, chosen: Tensor) -> Self:
        """Return the samples at these indices."""
        split: Any = self
        values = {item.name: getattr(self, item.name) for item in fields(split)}
        taken = {name: [value[i] for i in chosen.tolist()] for name, value in values.items() if isinstance(value, list)}
        changed: Self = replace(split, labels=self.labels[chosen], **taken)
        return changed

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


Split = ArraySplit | LazySplit
Lazy = TypeVar("Lazy", bound=LazySplit)


def _digest(labels: Tensor, parts: Iterable[bytes]) -> str:
    digest = sha256(labels.numpy().tobytes())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def subsample(split: Split, count: int) -> Split:
    """Return at most `count` samples of a split, spread evenly."""
    if len(split) <= count:
        return split
    return split.take(torch.linspace(0, len(split) - 1, count).round().long())


def image_size(split: Split, index: int) -> tuple[int, int] | None:
    """Return width and height from the header, or None for a bad image, which is reported when it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with split.open(index) as image:
                return image.size
    except Exception:  # decoders raise nearly anything on a damaged file
        return None


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
        """Return a line with classes, images and the sizes of some of them, then a line for each note."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        sample, text = subsample(self.splits["train"], SAMPLED), ""
        if sizes := [size for index in range(len(sample)) if (size := image_size(sample, index))]:
            widths, heights = zip(*sizes, strict=True)
            least, most = (f"{pick(widths)}x{pick(heights)}" for pick in (min, max))
            text = f"; {least} pixels" if least == most else f"; from {least} to {most} pixels in {len(sizes)} of them"
        lines = [f"{self.name}: {len(self.classes)} classes, images: {counts}{text}", *self.notes]
        return "\n".join(map(printable, lines))

    def noting(self, *notes: str) -> "Source":
        """Return the source with more notes; empty ones are dropped."""
        return replace(self, notes=(*self.notes, *(note for note in notes if note)))


def choose_splits(found: Sequence[str], data: DataConfig) -> dict[str, str]:
    """Return the names of the source's splits by role; val and test may be missing.

    The names in --train-split and --val-split need not be among those found (`train[:10%]`).
    """
    train, val, test = (
        next((name for name in names if name in found), None) for names in (TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES)
    )
    chosen = {"train": data.train_split or train, "val": data.val_split or val}
    chosen["test"] = None if test in chosen.values() else test
    return {role: name for role, name in chosen.items() if name is not None}


def missing_split(chosen: Mapping[str, str], found: Sequence[str]) -> str | None:
    """Return the first split that is not found: of train, of val unless there is a test split, and of those chosen."""
    needed = {"train": "train"} | ({} if "test" in chosen else {"val": "val"}) | dict(chosen)
    return next((name for name in needed.values() if name not in found), None)


def assemble(
    name: str, classes: list[str], splits: Mapping[str, LazySplit], data: DataConfig, notes: Sequence[str] = ()
) -> Source:
    """Return a source of splits by role, with notes on classes that a split lacks.

    Without val, a part of train is held out; raises UserError if that is impossible.
    """
    notes = list(notes)
    if "val" not in splits:
        train, val = hold_out(splits["train"], data.split_seed)
        splits = {"train": train, "val": val, **{role: split for role, split in splits.items() if role == "test"}}
        note = f"val is {HELD_OUT:.0%} of the training images of each class, drawn by data.split_seed {data.split_seed}"
        note += ": there is no validation split"
        if "test" in splits:
            note += "; test is for the closing numbers (--val-split test evaluates on it and trains on all of train)"
        notes.insert(0, note)
    for role, split in splits.items():
        present = set(split.labels.tolist())
        if missing := [label for number, label in enumerate(classes) if number not in present]:
            notes.append(f"{len(missing)} of {len(classes)} classes have no image in {role}: {first_names(missing)}")
    return Source(name, classes, splits, tuple(notes))


def hold_out(split: Lazy, seed: int) -> tuple[Lazy, Lazy]:
    """Divide a split into training and held-out images: a tenth of each class, at least one of two.

    Raises UserError if every class has a single image.
    """
    held = torch.zeros(len(split), dtype=torch.bool)
    order = split.labels.argsort(stable=True)
    for label, indices in enumerate(order.split(split.labels.bincount().tolist())):
        generator = torch.Generator().manual_seed(fold(seed, label))
        count = max(round(HELD_OUT * len(indices)), int(len(indices) > 1))
        held[indices[torch.randperm(len(indices), generator=generator)[:count]]] = True
    if not held.any():
        raise UserError("no class has two images, so none can be held out", WHERE, "add images, or a validation split")
    return split.take((~held).nonzero()[:, 0]), split.take(held.nonzero()[:, 0])
