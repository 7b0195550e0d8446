"""Splits of images with masks, which are read or made on demand, and the check of masks before a run."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from pdvit.data.images import BadImage, BadMask, attempt, refuse_bad, try_read
from pdvit.data.masks.table import OUTSIDE, ClassTable
from pdvit.data.sources import first_names
from pdvit.data.sources.split import FileSplit, Source, Split, image_size
from pdvit.errors import UserError

Pair = tuple[Image.Image, Tensor]
Log = Callable[[str], None]

LOGGED = 4096  # masks between two progress messages
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

    masks: list[Path]
    table: ClassTable

    def mask(self, index: int) -> Tensor:
        """Read the file of a mask."""
        return self.table.read(FileSplit(self.masks, self.labels).open(index))

    def mask_name(self, index: int) -> str:
        """Return the mask's path."""
        return str(self.masks[index])

    def key(self, index: int) -> str:
        """Return the file names of image and mask."""
        return f"{super().key(index)}/{self.masks[index].name}"

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
    gather: Callable[[Callable[[], Any]], list[dict[int, Any]]] = lambda scan: [scan()],
) -> Source:
    """Read mask files before the run; return the source with notes on them.

    `every` reads all masks, and refuses those that ignore every pixel. Else held-out masks are read, since their faults
    would end the run after the training, and the first training mask, since it shows a fault that all have. Classes
    without a pixel in a split are noted. `share` is rank and number of the processes that divide the work, `gather`
    `Ranks.gather`. Raises UserError for bad masks, and for a held-out split of which no pixel has a class.
    """
    bad, notes, classes = dict[str, str](), list[str](), source.classes
    for name, split in source.splits.items():
        assert isinstance(split, MaskFiles)
        count, found = len(split) if every or name != "train" else 1, dict[int, Any]()
        read = partial(_classes_in, split, every)
        for part in gather(partial(scan_masks, read, range(share[0], count, share[1]), name, workers, log)):
            found |= part
        bad |= {item.name: item.reason for _, item in sorted(found.items()) if isinstance(item, BadMask)}
        present = set[int]().union(*(item for item in found.values() if not isinstance(item, BadMask)))
        if count == len(split) and len(present) < len(classes):
            absent = [label for place, label in enumerate(classes) if place not in present]
            notes.append(f"{len(absent)} of {len(classes)} classes are in no mask of {name}: {first_names(absent)}")
        if name != "train" and not present and not bad:
            what = f"no pixel of the {len(split)} masks of {name} has a class"
            raise UserError(what, "data.source (--data)", f"label the masks of {name}, or move them away")
    refuse_bad(bad, TIP, "mask")
    return source.noting("all masks are sound" if every else "", *notes)


def _classes_in(split: MaskFiles, labelled: bool, index: int) -> BadMask | set[int]:
    """Return the classes in a mask, or its fault; with `labelled` a mask without classes has one."""
    mask = try_mask(split, index, image_size(split, index))
    if isinstance(mask, BadMask):
        return mask
    classes = set(mask.flatten().bincount()[:OUTSIDE].nonzero().flatten().tolist())
    return classes if classes or not labelled else BadMask(split.mask_name(index), "all of its pixels are ignored")


def scan_masks(read: Callable[[int], Any], indices: Sequence[int], name: str, workers: int, log: Log) -> dict[int, Any]:
    """Return `read(index)` for the masks of a split, by index, computed in threads: decoders release the GIL."""
    found: dict[int, Any] = {}
    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, workers)) as pool:
        # the filters are global: set out here, this one stays while threads add and take back their own
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for index, result in zip(indices, pool.map(read, indices), strict=True):
                found[index] = result
                if len(found) % LOGGED == 0:
                    log(f"read {len(found):,} masks of {name}")
        finally:
            pool.shutdown(cancel_futures=True)  # a stop or an error does not wait for the others
    return found
