"""Class tables: the class of each value or colour of a mask. From ids, or from files with id, name and colour."""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pdvit.data.sources import printable
from pdvit.errors import UserError

# Training ids of pixels without a class: ignored in loss and metrics; or outside of the table, or of the image.
IGNORED, OUTSIDE = 255, 254
IDS, COLOURS = 2**16, 2**24
COLUMNS = ("id", "name", "colour")
IGNORED_NAMES = ("unlabelled", "unlabeled", "void", "ignore", "ignored")
TIP = "write a line for each class: id TAB name, or id TAB name TAB #804080; without ids begin with name TAB colour"
Colour = tuple[int, int, int]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ClassTable:
    """The classes of a set of masks, in the order of their training ids.

    Attributes:
        names: name of each class.
        palette: colour of each class.
        ids: training id by value of a mask, 255 for ignored values; None: masks are read by colour.
        colours: training id by colour; None: masks with colours are refused.
    """

    names: list[str]
    palette: list[Colour]
    ids: Mapping[int, int] | None
    colours: Mapping[Colour, int] | None = None

    @classmethod
    def of_ids(
        cls, names: Mapping[int, str], ignored: Iterable[int] = (), palette: list[Colour] | None = None
    ) -> "ClassTable":
        """Return the table of masks whose values are ids (id -> name); 255 is ignored unless it is a class."""
        ids = dict.fromkeys((255, *ignored), IGNORED) | {value: place for place, value in enumerate(names)}
        return cls(list(names.values()), palette or default_palette(len(names)), ids)

    def identity(self) -> str:
        """Return what two equal tables share: classes, ids and colours in masks, but not the palette."""
        ids, colours = (sorted(known.items()) if known else known for known in (self.ids, self.colours))
        return repr((self.names, ids, colours))

    def read(self, image: Image.Image) -> Tensor:
        """Decode an open mask: training ids, uint8 `(H, W)`; raises ValueError for values outside of the table."""
        coloured = self.colours is not None and (self.ids is None or image.mode in ("RGB", "RGBA"))
        values = mask_values(image, coloured)
        found: Array = (self._lookup_colours if coloured else self._lookup_ids)[values]
        if len(outside := np.unique(values[found == OUTSIDE]).tolist()):
            names = [f"#{value:06x}" if coloured else str(value) for value in outside[:10]]
            listed = ", ".join(names) + (", ..." if len(outside) > len(names) else "")
            unit = "colour" if coloured else "id"
            raise ValueError(f"outside of the table of {len(self.names)} classes: {unit} {listed}")
        return torch.from_numpy(found)

    @cached_property
    def _lookup_ids(self) -> Array:
        return _lookup(IDS, self.ids or {})

    @cached_property
    def _lookup_colours(self) -> Array:
        packed = {red << 16 | green << 8 | blue: place for (red, green, blue), place in (self.colours or {}).items()}
        return _lookup(COLOURS, packed)


def _lookup(size: int, places: Mapping[int, int]) -> Array:
    lookup = np.full(size, OUTSIDE, np.uint8)
    lookup[list(places)] = list(places.values())
    return lookup


def mask_values(image: Image.Image, coloured: bool = False) -> Array:
    """Decode an open mask `(H, W)`: its values (of a palette the indices), or its colours, 0xrrggbb.

    Raises ValueError for a JPEG, whose pixels are not exact, and for pixels that are not ids; or the decoder's errors.
    """
    with image:
        if image.format in ("JPEG", "MPO"):
            raise ValueError("it is a JPEG, whose pixels are not exact: save masks as PNG")
        if coloured:
            return np.array(image.convert("RGB")) @ np.array([2**16, 2**8, 1], np.int32)
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise ValueError(f"it is {image.mode}, where ids are expected: there is no table with colours")
        tile: Any = getattr(image, "tile", None)
        packing = tile[0][3] if tile else None  # decoding empties it
        name = packing[0] if isinstance(packing, tuple) else packing  # of TIFF, of PNG
        # Pillow stretches grey values of 2 and 4 bits to 0 to 255
        values = np.array(image) // {"L;2": 85, "L;4": 17}.get(str(name)[:3], 1)
    if image.mode.startswith("I") and (values.min(initial=0) < 0 or values.max(initial=0) >= IDS):
        raise ValueError(f"ids from {values.min()} to {values.max()} are not whole numbers below {IDS}")
    return values.astype(np.uint16) if values.dtype != np.uint8 else values


def default_palette(count: int) -> list[Colour]:
    """Return distinct colours, those of Pascal VOC: the bits of the class number, spread over the channels."""

    def channel(number: int, offset: int) -> int:
        return sum((number >> 3 * bit + offset & 1) << 7 - bit for bit in range(8))

    return [(channel(number, 0), channel(number, 1), channel(number, 2)) for number in range(count)]


class _Row(NamedTuple):
    name: str
    id: int | None
    colour: Colour | None


def read_table(path: Path) -> ClassTable:
    """Read a class table; the columns of a file without header are id, name and optionally colour.

    A table without ids is for masks that are colours. Classes named Unlabelled, Void or Ignored are ignored, and so is
    the value 255 unless it is a class. Raises UserError for a file that is not such a table.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text else ",")
        lines = [[cell.strip() for cell in line] for line in reader if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the class table can't be read: {error}", str(path), TIP) from error
    try:
        rows = _parse_rows(lines)
        classes = [row for row in rows if row.name.casefold() not in IGNORED_NAMES]
        _check_rows(rows, classes)
    except ValueError as error:
        raise UserError(printable(str(error)), str(path), TIP) from error
    place = {row.name: number for number, row in enumerate(classes)}
    ids = {row.id: place.get(row.name, IGNORED) for row in rows if row.id is not None}
    colours = {row.colour: place.get(row.name, IGNORED) for row in rows if row.colour is not None}
    palette = [row.colour for row in classes if row.colour is not None] or default_palette(len(classes))
    return ClassTable(list(place), palette, {255: IGNORED} | ids if ids else None, colours or None)


def _parse_rows(lines: list[list[str]]) -> list[_Row]:
    """Return the rows of a table; raises ValueError for a cell that is missing or invalid."""
    header = [cell.lower().replace("color", "colour") for cell in lines[0]] if lines else []
    header, lines = (header, lines[1:]) if "name" in header else (list(COLUMNS), lines)
    rows = []
    for number, line in enumerate(lines, 1):
        cells = dict.fromkeys(COLUMNS, "") | dict(zip(header, line, strict=False))
        name, value, colour = cells["name"], cells["id"], cells["colour"]
        if not name:
            raise ValueError(f"class {number} of the table has no name")
        if value and not (value.isdecimal() and int(value) < IDS):
            raise ValueError(f"id '{value}' of '{name}' is not a whole number below {IDS}")
        levels = [int(level) for level in colour.split()] if re.fullmatch(r"\d{1,3} +\d{1,3} +\d{1,3}", colour) else []
        if re.fullmatch("#[0-9a-fA-F]{6}", colour):
            levels = list(bytes.fromhex(colour[1:]))
        if colour and not (levels and max(levels) < 256):
            raise ValueError(f"'{colour}' of '{name}' is not a colour such as #804080 or 128 64 128")
        rows.append(_Row(name, int(value) if value else None, (levels[0], levels[1], levels[2]) if levels else None))
    return rows


def _check_rows(rows: list[_Row], classes: list[_Row]) -> None:
    """Raise ValueError for too few or many classes, columns with gaps, and values that occur twice."""
    if not 2 <= len(classes) <= OUTSIDE:
        raise ValueError(f"the table has {len(classes)} classes that are not ignored, and needs 2 to {OUTSIDE}")
    for column, checked in (("id", rows), ("colour", rows), ("name", classes)):
        cells = [getattr(row, column) for row in checked]
        if None in cells and any(cell is not None for cell in cells):
            raise ValueError(f"'{checked[cells.index(None)].name}' has no {column}, others have one")
        if twice := [cell for cell in cells if cell is not None and cells.count(cell) > 1]:
            raise ValueError(f"two classes have the same {column}: {twice[0]}")
    if rows[0].id is None and rows[0].colour is None:
        raise ValueError("the table has neither ids nor colours")
