"""Tables of classes: which value of a mask, or which colour, is which class."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor

# Training ids of pixels without a class: ignored in loss and scores; or beyond the table, or beyond the image.
IGNORED, OUTSIDE = 255, 254
VALUES = 2**16
NAMED = 10
Colour = tuple[int, int, int]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ClassTable:
    """The classes of a set of masks, in the order of their training ids.

    Attributes:
        names: name of each class.
        palette: colour of each class.
        ids: training id by value of a mask, 255 for values that are ignored; None: masks are read by colour.
        colours: training id by colour; None: masks are never colours.
    """

    names: list[str]
    palette: list[Colour]
    ids: Mapping[int, int] | None
    colours: Mapping[Colour, int] | None = None

    @classmethod
    def of_ids(
        cls, names: Mapping[int, str], ignored: Iterable[int] = (), palette: list[Colour] | None = None
    ) -> "ClassTable":
        """Return the table of masks whose values are ids (id -> name); 255 is ignored unless it is one of them."""
        ids = dict.fromkeys((255, *ignored), IGNORED) | {value: place for place, value in enumerate(names)}
        return cls(list(names.values()), palette or default_palette(len(names)), ids)

    def identity(self) -> str:
        """Return what makes two tables the same: classes and what they are read from, not how they are shown."""
        ids, colours = (sorted(known.items()) if known else known for known in (self.ids, self.colours))
        return repr((self.names, ids, colours))

    def read(self, path: Path) -> Tensor:
        """Read a mask: training ids, uint8 `(H, W)`.

        Raises ValueError that says which ids or colours are outside of the table, or that it holds neither.
        """
        with open_mask(path) as image:
            if self.ids is not None and image.mode not in ("RGB", "RGBA"):
                return torch.from_numpy(self._by_id(values_of(image)))
            if self.colours is None:
                raise ValueError(f"it is {image.mode}, where ids are expected: the table has no colours")
            return torch.from_numpy(self._by_colour(np.array(image.convert("RGB"))))

    def _by_id(self, values: Array) -> Array:
        found: Array = self._of_value[values]
        if len(outside := np.unique(values[found == OUTSIDE])):
            raise ValueError(f"{_some('id', map(str, outside))} outside of the table of {len(self.names)} classes")
        return found

    def _by_colour(self, pixels: Array) -> Array:
        packed = pixels.astype(np.int32) @ np.array([2**16, 2**8, 1], np.int32)
        known, ids = self._packed_colours
        at = np.searchsorted(known, packed).clip(max=len(known) - 1)
        found: Array = np.where(known[at] == packed, ids[at], np.uint8(OUTSIDE))
        if len(outside := np.unique(packed[found == OUTSIDE])):
            colours = (f"#{colour:06x}" for colour in outside)
            raise ValueError(f"{_some('colour', colours)} outside of the table of {len(self.names)} classes")
        return found

    @cached_property
    def _of_value(self) -> Array:
        """Training id of every value that a mask may have."""
        table = np.full(VALUES, OUTSIDE, np.uint8)
        for value, place in (self.ids or {}).items():
            table[value] = place
        return table

    @cached_property
    def _packed_colours(self) -> tuple[Array, Array]:
        """Packed colours in order, and their training ids."""
        colours = (self.colours or {}).items()
        packed = sorted((red << 16 | green << 8 | blue, place) for (red, green, blue), place in colours)
        return np.array([colour for colour, _ in packed], np.int32), np.array([place for _, place in packed], np.uint8)


def open_mask(path: Path) -> ImageFile:
    """Open a mask; raises ValueError for a JPEG, whose values are not exact, and whatever its decoder does."""
    if path.is_fifo():
        raise ValueError("it is a pipe, not a file")
    image = Image.open(path)
    if image.format in ("JPEG", "MPO"):
        image.close()
        raise ValueError("it is a JPEG, whose pixels are not exact: save masks as PNG")
    return image


def values_of(image: ImageFile) -> Array:
    """Return the values of an open mask `(H, W)`, of a palette its indices; ValueError where it holds no ids."""
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise ValueError(f"it is {image.mode}, where ids are expected")
    raw = image.tile[0][3] if image.tile else None  # decoding empties it
    # how values are packed, by name: PNG's alone, first of several things in TIFF
    name = str(raw[0] if isinstance(raw, tuple) else raw)
    values, spread = np.array(image), {"L;2": 85, "L;4": 17}.get(name[:3], 1)
    if spread > 1:  # Pillow spreads grey values of 2 and 4 bits over 0 to 255
        values = values // spread
    if image.mode.startswith("I") and (values.min(initial=0) < 0 or values.max(initial=0) >= VALUES):
        raise ValueError(f"ids from {values.min()} to {values.max()} are no whole numbers below {VALUES}")
    return values.astype(np.uint16) if values.dtype != np.uint8 else values


def default_palette(count: int) -> list[Colour]:
    """Return colours that differ, as Pascal VOC has them: the bits of a class's number, spread over the channels."""

    def channel(number: int, which: int) -> int:
        return sum((number >> 3 * place + which & 1) << 7 - place for place in range(8))

    return [(channel(number, 0), channel(number, 1), channel(number, 2)) for number in range(count)]


def _some(what: str, found: Iterable[str]) -> str:
    names = list(found)
    shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{what} {shown} is" if len(names) == 1 else f"{what}s {shown} are"
