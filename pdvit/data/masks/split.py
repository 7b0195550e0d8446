"""Splits whose images have masks; both are read, or made, on demand. And the check of masks before a run."""

import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pdvit.data.images import BadImage, BadMask, attempt, read_image, refuse_bad, strict_decoders
from pdvit.data.loader import leave_signals
from pdvit.data.masks.table import OUTSIDE, ClassTable
from pdvit.data.sources import first_names
from pdvit.data.sources.split import FileSplit, LazySplit, Source, image_size
from pdvit.errors import UserError

Pair = tuple[Image.Image, Tensor]
Log = Callable[[str], None]


def log_to_stderr(text: str) -> None:
    """Print progress without mixing it with the output of a command."""
    print(text, file=sys.stderr)


Scan = Callable[["MaskFiles", int], Any]
# Masks that a worker reads at a time, and seconds between two progress messages.
CHUNK, SECONDS = 64, 10.0
TIP = "mend or remove them; ids or colours outside of the table need a line in it (--classes)"


class MaskSplit(LazySplit):
    """A split whose images have a class for every pixel; its `labels` are all 0."""

    flip: float = 0.5  # default probability of mirroring a training image

    @abstractmethod
    def mask(self, index: int) -> Tensor:
        """Return the training id of every pixel, uint8 `(H, W)`, 255 if ignored; raises any error of the decoder."""

    @abstractmethod
    def mask_name(self, index: int) -> str:
        """Return where the mask is, for messages."""


@dataclass(frozen=True)
class MaskFiles(FileSplit, MaskSplit):
    """Image files with mask files, which are read through one class table."""

    masks: list[Path]
    table: ClassTable

    def mask(self, index: int) -> Tensor:
        """Read the file of a mask."""
        return self.table.read(self.masks[index])

    def mask_name(self, index: int) -> str:
        """Return the mask's path."""
        return str(self.masks[index])

    def key(self, index: int) -> str:
        """Return the file names of image and mask."""
        return f"{self.paths[index].name}/{self.masks[index].name}"

    def hash(self) -> str:
        """Return a hash of the names and the table."""
        return sha256(f"{super().hash()} {self.table.identity()}".encode(errors="surrogateescape")).hexdigest()[:16]


def try_pair(split: MaskSplit, index: int) -> Pair | BadImage:
    """Decode an image `(W, H)` and its mask, or return the fault of one of them."""
    mask = try_mask(split, index, split.mask)
    if isinstance(mask, BadImage):
        return mask
    with strict_decoders():
        image = attempt(split, index, lambda: read_image(split.open(index)))
    if isinstance(image, BadImage):
        return image
    return _wrong_size(split, index, image.size, mask) or (image, mask)


def try_mask(split: MaskSplit, index: int, read: Callable[[int], Any]) -> Any | BadMask:
    """Return `read(index)`, which reads a mask, or the mask's fault."""
    with strict_decoders():
        result = attempt(split, index, read, index)
    return BadMask(split.mask_name(index), result.reason) if isinstance(result, BadImage) else result


def _wrong_size(split: MaskSplit, index: int, size: tuple[int, int], mask: Tensor) -> BadMask | None:
    height, width = mask.shape
    if (width, height) == size:
        return None
    return BadMask(split.mask_name(index), f"it is {width}x{height}, its image {size[0]}x{size[1]}")


def check_masks(
    source: Source,
    every: bool,
    workers: int,
    log: Log,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[dict[int, Any]], list[dict[int, Any]]] = lambda found: [found],
) -> Source:
    """Read mask files before the run; return the source with notes on them.

    `every` reads all masks, refuses those that ignore every pixel, and notes classes without a pixel. Else held-out
    masks are read, since their faults would end the run after the training, and the first training mask, since it shows
    a fault that all have. `share` is rank and number of the processes that divide the work, `gather` their all_gather.

    Raises UserError for masks that do not decode, have values outside of the table or another size than their image,
    and for a held-out split of which no pixel has a class.
    """
    bad, notes = dict[str, str](), list[str]()
    for name, split in source.splits.items():
        if not isinstance(split, MaskFiles):
            continue
        count = len(split) if every or name != "train" else 1
        mine, found = range(share[0], count, share[1]), dict[int, Any]()
        for part in gather(scan_masks(split, name, _classes_in, mine, workers if count > 1 else 0, log)):
            found |= part
        found = dict(sorted(found.items()))
        bad |= {item.name: item.reason for item in found.values() if isinstance(item, BadMask)}
        present = frozenset[int]().union(*(item for item in found.values() if not isinstance(item, BadMask)))
        absent = [label for place, label in enumerate(source.classes) if place not in present]
        if every:
            ignoring = [split.mask_name(index) for index, item in found.items() if item == frozenset()]
            bad |= dict.fromkeys(ignoring, "all of its pixels are ignored")
            if absent:
                notes.append(
                    f"{len(absent)} of {len(source.classes)} classes are in no mask of {name}: {first_names(absent)}"
                )
        elif name != "train" and found and not present and not bad:
            what = f"no pixel of the {len(split)} masks of {name} has a class"
            raise UserError(what, "data.source (--data)", f"label the masks of {name}, or move them away")
    refuse_bad(bad, TIP, "mask")
    return source.noting("all masks are sound", *notes) if every else source


def _classes_in(split: MaskFiles, index: int) -> BadMask | frozenset[int]:
    """Return the classes in a mask, or its fault; an image that does not decode is not the mask's fault."""
    mask = try_mask(split, index, split.mask)
    if isinstance(mask, BadMask):
        return mask
    size = image_size(split, index)
    fault = _wrong_size(split, index, size, mask) if size else None
    return fault or frozenset(mask.flatten().bincount()[:OUTSIDE].nonzero().flatten().tolist())


@dataclass(frozen=True)
class _Scan(Dataset[tuple[int, Any]]):
    split: MaskFiles
    scan: Scan

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.scan(self.split, index)


def scan_masks(
    split: MaskFiles, name: str, scan: Scan, indices: Sequence[int], workers: int, log: Log
) -> dict[int, Any]:
    """Return `scan(split, index)` for these masks of a split, by index, computed in worker processes."""
    loader: Any = DataLoader(
        _Scan(split, scan),
        batch_size=CHUNK,
        sampler=indices,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals,
        generator=torch.Generator(),  # else it draws from the process generator
    )
    found: dict[int, Any] = {}
    logged = time.monotonic()
    for chunk in loader:
        found |= dict(chunk)
        if time.monotonic() - logged > SECONDS:
            logged = time.monotonic()
            log(f"read {len(found):,} of {len(indices):,} masks of {name}")
    return found
