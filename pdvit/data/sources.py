"""Sources: where labelled images come from, by name or path."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.errors import UserError, closest

VALIDATION_NAMES = ("val", "validation")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ArraySplit:
    """A small split held in memory: uint8 images `(N, 3, H, W)` and class indices `(N,)`."""

    images: Tensor
    labels: Tensor
    decoded: bool = False
    """Whether these were image files, which are cropped and flipped unless the user says otherwise."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FileSplit:
    """A split of image files, decoded when they are needed."""

    paths: list[Path]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)


Split = ArraySplit | FileSplit


@dataclass(frozen=True)
class Source:
    """Named splits (train, val, perhaps test) over one list of classes."""

    name: str
    classes: list[str]
    splits: dict[str, Split] = field(repr=False)

    @property
    def final_split(self) -> str:
        """The split of the closing numbers: test where there is one, so that settings are not chosen on it."""
        return "test" if "test" in self.splits else "val"

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on: classes, counts, and a hash of names or pixels by split."""
        return {"classes": len(self.classes)} | {
            name: {"images": len(split), "hash": _hash(split)} for name, split in self.splits.items()
        }

    def describe(self) -> str:
        """Say in one line what was found."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        return f"{self.name}: {len(self.classes)} classes, images: {counts}"


def _hash(split: Split) -> str:
    digest = sha256(split.labels.numpy().tobytes())
    if isinstance(split, ArraySplit):
        digest.update(split.images.numpy().tobytes())
    else:
        for path in split.paths:
            digest.update(f"{path.name}/".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def open_source(data: DataConfig) -> Source:
    """Open a source by name or path.

    Raises:
        UserError: the name is unknown, or the folder is missing, empty or not laid out as train/CLASS/IMAGE and
            val/CLASS/IMAGE.
    """
    if data.source in SOURCES:
        return SOURCES[data.source](data)
    path = Path(os.path.expanduser(data.source))
    if os.path.isdir(path):  # of os.path, because Path's own raises where a name is too long
        return _folder(path)
    looks_like_path = os.sep in data.source or os.path.exists(path)
    what = "there is no folder" if looks_like_path else "there is no source named"
    raise UserError(f"{what} '{data.source}'", "data.source (--data)", closest(data.source, SOURCES))


def source_label(data: DataConfig) -> str:
    """Return a short name of the source, fit for a run's name."""
    name = data.source if data.source in SOURCES else Path(os.path.expanduser(data.source)).resolve().name
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name) or "data"


@cache
def _digits_images() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 32x32, as `(N, 3, 32, 32)` uint8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long()


def _digits(data: DataConfig) -> Source:
    from sklearn.model_selection import train_test_split

    images, labels = _digits_images()

    def halve(indices: list[int], size: int) -> tuple[list[int], list[int]]:
        rest, held = train_test_split(indices, test_size=size, random_state=data.split_seed, stratify=labels[indices])
        return rest, held

    rest, test = halve(list(range(len(labels))), 360)
    train, val = halve(rest, 237)
    parts = {"train": train, "val": val, "test": test}
    splits: dict[str, Split] = {name: ArraySplit(images[part], labels[part]) for name, part in parts.items()}
    return Source("digits", [str(digit) for digit in range(10)], splits)


def _folder(root: Path) -> Source:
    train = _one_of(root, ("train",))
    classes = sorted(item.name for item in _list(train) if item.is_dir())
    if not classes:
        raise UserError(f"no class folders in '{train}'", "data.source (--data)", "expected train/CLASS/IMAGE")
    splits: dict[str, Split] = {"train": _file_split(train, classes)}
    splits["val"] = _file_split(_one_of(root, VALIDATION_NAMES), classes)
    if (root / "test").is_dir() and any(item.is_dir() for item in _list(root / "test")):
        splits["test"] = _file_split(root / "test", classes)
    return Source(root.resolve().name, classes, splits)


def _one_of(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    found = ", ".join(sorted(item.name for item in _list(root))[:6]) or "nothing"
    raise UserError(
        f"'{root}' has no folder {names[0]}/ (found: {found})",
        "data.source (--data)",
        "lay it out as train/CLASS/IMAGE and val/CLASS/IMAGE",
    )


def _file_split(folder: Path, classes: list[str]) -> FileSplit:
    found = {item.name for item in _list(folder) if item.is_dir()}
    if unknown := sorted(found - set(classes)):
        raise UserError(
            f"class '{unknown[0]}' of {folder.name}/ is not in train/ ({len(unknown)} such)",
            str(folder),
            "give every split the same class folders",
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        here = list_images(folder / name) if name in found else []
        if not here:
            raise UserError(
                f"class '{name}' has no images in {folder.name}/",
                str(folder / name),
                f"add images ({', '.join(SUFFIXES[:3])}, ...) or remove the class from every split",
            )
        paths += here
        labels += [label] * len(here)
    return FileSplit(paths, torch.tensor(labels))


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder in a fixed order, told by their suffix."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _list(folder: Path) -> list[Path]:
    try:
        return [item for item in folder.iterdir() if not item.name.startswith(".")]
    except OSError as error:
        raise UserError(f"the folder can't be read: {error.strerror}", str(folder), "check its permissions") from error


SOURCES: dict[str, Callable[[DataConfig], Source]] = {"digits": _digits}
