"""Splits, with their images in memory or in files, and sources: splits by role over one list of classes."""

import os
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.randomness import fold
from pdvit.data.sources import WHERE, first_names
from pdvit.errors import UserError, closest, printable

TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES = ("train", "training"), ("val", "validation", "valid"), ("test",)
SPLIT_NAMES = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}
NEEDED, HELD_OUT = ("train", "val"), 0.1
SAMPLED = 32  # images whose sizes are described
# All that is decoded: Pillow would give renamed PostScript to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


class Split(ABC):
    """Images with their classes, opened by any process; a data class, whose lists and tensors have an item for each."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return an image whose header is read and whose pixels may not be; raises the errors of its decoder."""

    def name(self, index: int) -> str:
        """Return the location of the image, for messages; by default its number, from 0 as everywhere."""
        return f"image {index}"

    def key(self, index: int) -> str:
        """Return the name of the image without the location of the set, which may move or be packed."""
        return os.path.basename(self.name(index))

    def take(self, chosen: Tensor) -> Self:
        """Return the samples at these indices."""
        taken: dict[str, Any] = {name: value[chosen] for name, value in vars(self).items() if isinstance(value, Tensor)}
        lists = {name: value for name, value in vars(self).items() if isinstance(value, list)}
        return replace(self, **taken, **{k: [v[i] for i in chosen.tolist()] for k, v in lists.items()})  # type: ignore[type-var]

    def hash(self) -> str:
        """Return a hash of labels and names."""
        keys = "".join(f"{self.key(index)}/" for index in range(len(self)))
        return sha256(self.labels.numpy().tobytes() + keys.encode(errors="surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class ArraySplit(Split):
    """A small split held in memory: uint8 images `(N, 3, H, W)` and class indices `(N,)`."""

    images: Tensor
    labels: Tensor

    def open(self, index: int) -> Image.Image:
        """Return an image."""
        return Image.fromarray(self.images[index].permute(1, 2, 0).cpu().numpy())

    def hash(self) -> str:
        """Return a hash of labels and pixels."""
        return sha256(self.labels.numpy().tobytes() + self.images.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class FileSplit(Split):
    """A split of image files, which are opened when they are read."""

    paths: list[Path]
    labels: Tensor

    def open(self, index: int) -> Image.Image:
        """Open a file as an image."""
        if self.paths[index].is_fifo():
            raise ValueError("it is a pipe, not a file")  # opening it would block
        return open_image(self.paths[index])

    def name(self, index: int) -> str:
        """Return the path."""
        return str(self.paths[index])


@dataclass(frozen=True)
class ItemSplit(Split):
    """A split of items (no list) of a map-style data set, whose first element is an image or a stream of its bytes."""

    items: Any
    indices: list[int]
    labels: Tensor
    title: str

    def open(self, index: int) -> Image.Image:
        """Return an item as an image; a copy, since the reader closes it."""
        found = self.items[self.indices[index]][0]
        if not isinstance(found, Image.Image):
            with found:
                return open_image(BytesIO(found.read()))
        copied = found.copy()
        if found.format == "TIFF":  # a copy lacks this and the tags, by which levels are read
            vars(copied).update(format="TIFF", tag_v2=vars(found)["tag_v2"])
        return copied

    def name(self, index: int) -> str:
        """Return the data set and the number of the item in it."""
        return f"{self.title}[{self.indices[index]}]"

    def key(self, index: int) -> str:
        """Return the number of the item."""
        return str(self.indices[index])


class MaskSplit(Split):
    """A split whose images have a class for every pixel; its `labels` are all 0."""

    flip: float = 0.5  # default probability of mirroring a training image

    @abstractmethod
    def mask(self, index: int) -> Tensor:
        """Return the training id of every pixel, uint8 `(H, W)`, 255 if ignored; raises any error of the decoder."""

    def mask_name(self, index: int) -> str:
        """Return the location of the mask, for messages."""
        return self.name(index)


def open_image(file: Path | BytesIO) -> Image.Image:
    """Return an image of a supported format, whose pixels are not read yet; raises Pillow's errors."""
    return Image.open(file, formats=FORMATS)


def upright(image: Image.Image) -> Image.Image:
    """Decode an open image, and turn it as its EXIF says; EXIF that is damaged is left alone, as viewers do."""
    image.filename = ""  # type: ignore[attr-defined]  # else Pillow maps the file of a grey TIFF on its side, as noise
    image.load()
    with suppress(Exception):  # Pillow raises nearly anything
        ImageOps.exif_transpose(image, in_place=True)
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an open image after its turn, from the header."""
    with suppress(Exception):
        exif = Image.Image.getexif(image)  # that of PNG would decode the pixels
        if exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8) and image.format != "TIFF":  # Pillow itself turns these
            return image.size[::-1]
    return image.size


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
                return upright_size(image)
    except Exception:  # decoders raise nearly anything on a damaged file
        return None


@dataclass(frozen=True)
class Source:
    """Splits by role (train, val and possibly test) over one list of classes, with notes for the user."""

    name: str
    classes: list[str]
    splits: Mapping[str, Split] = field(repr=False)
    notes: tuple[str, ...] = ()
    palette: list[tuple[int, int, int]] | None = None  # a colour for each class, if pixels are labelled

    @property
    def final_split(self) -> str:
        """The split of the closing numbers: test if there is one, so that settings are not chosen on it; or val."""
        return next((name for name in ("test", "val") if name in self.splits), "all")

    def select(self, name: str) -> Split:
        """Return a split, or `all` of them as one; raises UserError if there is none, or they can't be joined."""
        if name in self.splits:
            return self.splits[name]
        if name != "all":
            raise UserError(f"{self.name} has no split '{name}'", "--split", closest(name, [*self.splits, "all"]))
        parts, joined = [vars(split) for split in self.splits.values()], dict[str, Any]()
        for key, *values in zip(parts[0], *(part.values() for part in parts), strict=True):
            if isinstance(values[0], Tensor | list):
                joined[key] = torch.cat(values) if isinstance(values[0], Tensor) else [*chain(*values)]
            elif any(value is not values[0] for value in values):
                tip = f"measure one of them: {', '.join(self.splits)}"
                raise UserError(f"the splits of {self.name} can't be joined", "--split all", tip)
        return replace(next(iter(self.splits.values())), **joined)  # type: ignore[type-var]

    def fingerprint(self) -> dict[str, Any]:
        """Return what a resumed run compares: classes, counts, and a hash of names or pixels by split."""
        return {"classes": len(self.classes)} | {
            name: {"images": len(split), "hash": split.hash()} for name, split in self.splits.items()
        }

    def describe(self) -> str:
        """Return a line with classes, images and sizes of some, then the notes, and warnings about repeated files."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        sample, text = subsample(self.splits["train"], SAMPLED), ""
        if sizes := [size for index in range(len(sample)) if (size := image_size(sample, index))]:
            widths, heights = zip(*sizes, strict=True)
            least, most = (f"{pick(widths)}x{pick(heights)}" for pick in (min, max))
            text = f"; {least} pixels" if least == most else f"; {len(sizes)} of them from {least} to {most} pixels"
        lines = [f"{self.name}: {len(self.classes)} classes, images: {counts}{text}", *self.notes]
        # files that are there more than once, by resolved folder and name
        resolve, seen, again = cache(os.path.realpath), dict[int, tuple[str, int]](), defaultdict[str, list[str]](list)
        for role, split in self.splits.items():
            for index, label in enumerate(split.labels.tolist() if isinstance(split, FileSplit) else []):
                folder, _, file = (name := split.name(index)).rpartition("/")
                first = seen.setdefault(hash((resolve(folder), file)), place := (role, label))
                if first is not place:
                    text = "with two labels" if first[1] != label else "repeated"
                    again["in two splits" if first[0] != role else text].append(name)
        lines += [f"warning: images {text}: {len(names):,} ({first_names(names)})" for text, names in again.items()]
        return "\n".join(map(printable, lines))

    def noting(self, *notes: str) -> "Source":
        """Return the source with more notes; empty ones are dropped."""
        return replace(self, notes=(*self.notes, *(note for note in notes if note)))


def choose_splits(
    found: Sequence[str | None], data: DataConfig, where: str, tip: str, training: bool, needed: Sequence[str] = NEEDED
) -> dict[str, str]:
    """Return the names of splits by role; training needs those `needed` (test does for val); raises UserError."""
    train, val, test = (
        next((name for name in names if name in found), None) for names in (TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES)
    )
    roles = {"train": data.train_split or train, "val": data.val_split or val}
    roles["test"] = None if test in roles.values() else test
    chosen = {role: name for role, name in roles.items() if name is not None}
    names = {role: role for role in needed if training and (role != "val" or "test" not in chosen)} | chosen
    names = names or {"val": "val"}
    if missing := next((name for name in names.values() if name not in found), None):
        listed = first_names([name for name in found if name]) or "nothing"
        raise UserError(f"there is no split '{missing}' (found: {listed})", where, tip)
    return chosen


def assemble(name: str, classes: list[str], splits: Mapping[str, Split], data: DataConfig, training: bool) -> Source:
    """Return a source with notes on classes that a split lacks, in training with a val taken from train if needed."""
    notes = []
    if training and "val" not in splits:
        splits, note = hold_out(splits, data.split_seed)
        if "test" in splits:
            note += "; test is for the closing numbers (--val-split test evaluates on it and trains on all of train)"
        notes.append(note)
    for role, split in splits.items():
        present = set(split.labels.tolist())
        if missing := [label for number, label in enumerate(classes) if number not in present]:
            notes.append(f"{len(missing)} of {len(classes)} classes have no image in {role}: {first_names(missing)}")
    return Source(name, classes, splits, tuple(notes))


def hold_out(splits: Mapping[str, Split], seed: int) -> tuple[dict[str, Split], str]:
    """Return splits with a val taken from train: a tenth of each class, at least one image of two; and a note on it."""
    train = splits["train"]
    held = torch.zeros(len(train), dtype=torch.bool)
    order = train.labels.argsort(stable=True)
    for label, indices in enumerate(order.split(train.labels.bincount().tolist())):
        generator = torch.Generator().manual_seed(fold(seed, label))
        count = max(round(HELD_OUT * len(indices)), int(len(indices) > 1))
        held[indices[torch.randperm(len(indices), generator=generator)[:count]]] = True
    if not held.any():
        raise UserError("no class has two images, so none can be held out", WHERE, "add images, or a validation split")
    others = {role: split for role, split in splits.items() if role != "train"}
    note = f"val is {HELD_OUT:.0%} of the training images, drawn by data.split_seed {seed}: there is no val split"
    return {"train": train.take((~held).nonzero()[:, 0]), "val": train.take(held.nonzero()[:, 0]), **others}, note
