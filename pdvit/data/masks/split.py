"""Splits whose images have masks, both read or made on demand, and the check of masks before a run."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pdvit.data.images import BadImage, BadMask, attempt, refuse_bad, try_read
from pdvit.data.loader import leave_signals
from pdvit.data.masks.table import OUTSIDE, ClassTable
from pdvit.data.sources import first_names
from pdvit.data.sources.split import FileSplit, Source, Split, image_size
from pdvit.errors import UserError

Pair = tuple[Image.Image, Tensor]
Log = Callable[[str], None]

# Masks that a worker reads at a time, and masks between two progress messages.
CHUNK, LOGGED = 64, 4096
TIP = "mend or remove them; ids or colours outside of the table need a line in it (--classes)"


class MaskSplit(Split):
    """A split whose images have a class for every pixel; its `labels` are all 0."""

    flip: float = 0.5  # default probability of mirroring a training image

    @abstractmethod
    def mask(self, index: int) -> Tensor:
        """Return the training id of every pixel, uint8 `(H, W)`, 255 if ignored; raises any error of the decoder."""

    def mask_name(self, index: int) -> str:
        """Return the location of the mask, for messages."""
        return self.name(index)


@dataclass(frozen=True)
class MaskFiles(FileSplit, MaskSplit):
    """Image files with mask files, which are read through one class table."""

    masks: FileSplit
    table: ClassTable

    def mask(self, index: int) -> Tensor:
        """Read the file of a mask."""
        return self.table.read(self.masks.open(index))

    def mask_name(self, index: int) -> str:
        """Return the mask's path."""
        return self.masks.name(index)

    def key(self, index: int) -> str:
        """Return the file names of image and mask."""
        return f"{super().key(index)}/{self.masks.key(index)}"

    def take(self, chosen: Tensor) -> "MaskFiles":
        """Return the pairs at these indices."""
        return replace(super().take(chosen), masks=self.masks.take(chosen))

    def hash(self) -> str:
        """Return a hash of the names and the table."""
        return sha256(f"{super().hash()} {self.table.identity()}".encode(errors="surrogateescape")).hexdigest()[:16]


def try_pair(split: MaskSplit, index: int) -> Pair | BadImage:
    """Decode an image `(W, H)` and its mask, or return the fault of one of them."""
    image = try_read(split, index)
    mask = try_mask(split, index, None if isinstance(image, BadImage) else image.size)
    if isinstance(mask, BadMask):
        return mask
    return image if isinstance(image, BadImage) else (image, mask)


def try_mask(split: MaskSplit, index: int, size: tuple[int, int] | None) -> Tensor | BadMask:
    """Decode a mask, or return its fault; `size` is width and height of its image, None if that does not decode."""
    mask = attempt(split, index, split.mask)
    if isinstance(mask, BadImage):
        return BadMask(split.mask_name(index), mask.reason)
    height, width = mask.shape
    if size is None or size == (width, height):
        return mask
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
        read, found = partial(_classes_in, split, every), dict[int, Any]()
        for part in gather(scan_masks(read, range(share[0], count, share[1]), name, workers if count > 1 else 0, log)):
            found |= part
        bad |= {item.name: item.reason for _, item in sorted(found.items()) if isinstance(item, BadMask)}
        present = frozenset[int]().union(*(item for item in found.values() if not isinstance(item, BadMask)))
        absent = [label for place, label in enumerate(source.classes) if place not in present]
        if every and absent:
            number = f"{len(absent)} of {len(source.classes)} classes"
            notes.append(f"{number} are in no mask of {name}: {first_names(absent)}")
        if name != "train" and found and not present and not bad:
            what = f"no pixel of the {len(split)} masks of {name} has a class"
            raise UserError(what, "data.source (--data)", f"label the masks of {name}, or move them away")
    refuse_bad(bad, TIP, "mask")
    return source.noting("all masks are sound", *notes) if every else source


def _classes_in(split: MaskFiles, labelled: bool, index: int) -> BadMask | frozenset[int]:
    """Return the classes in a mask, or its fault; with `labelled` a mask without classes has one."""
    mask = try_mask(split, index, image_size(split, index))
    if isinstance(mask, BadMask):
        return mask
    classes = frozenset(mask.flatten().bincount()[:OUTSIDE].nonzero().flatten().tolist())
    return classes if classes or not labelled else BadMask(split.mask_name(index), "all of its pixels are ignored")


def scan_masks(read: Callable[[int], Any], indices: Sequence[int], name: str, workers: int, log: Log) -> dict[int, Any]:
    """Return `read(index)` for the masks of a split, by index, computed in worker processes."""
    loader: Any = DataLoader(
        indices,  # type: ignore[arg-type]
        batch_size=CHUNK,
        num_workers=workers,
        collate_fn=partial(_read_chunk, read),
        worker_init_fn=leave_signals,
        generator=torch.Generator(),  # else it draws from the process generator
    )
    found: dict[int, Any] = {}
    for chunk in loader:
        found |= chunk
        if len(found) % LOGGED == 0:
            log(f"read {len(found):,} masks of {name}")
    return found


def _read_chunk(read: Callable[[int], Any], indices: list[int]) -> dict[int, Any]:
    return {index: read(index) for index in indices}
