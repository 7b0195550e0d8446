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
from PIL.ImageFile import ImageFile
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

    def read(self, path: Path) -> Tensor:
        """Read a mask: training ids, uint8 `(H, W)`; raises ValueError for values outside of the table."""
        with open_mask(path) as image:
            by_id = self.ids is not None and image.mode not in ("RGB", "RGBA")
            if by_id:
                values, lookup = mask_values(image), self._lookup_ids
            elif self.colours is not None:
                values = np.array(image.convert("RGB")) @ np.array([2**16, 2**8, 1], np.int32)
                lookup = self._lookup_colours
            else:
                raise ValueError(f"it is {image.mode}, where ids are expected: the table has no colours")
        found: Array = lookup[values]
        if len(outside := np.unique(values[found == OUTSIDE]).tolist()):
            names = [str(value) if by_id else f"#{value:06x}" for value in outside[:10]]
            more = ", ..." if len(outside) > len(names) else ""
            unit = "id" if by_id else "colour"
            raise ValueError(f"outside of the table of {len(self.names)} classes: {unit} {', '.join(names)}{more}")
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


def open_mask(path: Path) -> ImageFile:
    """Open a mask; raises ValueError for a JPEG, whose values are not exact, and any error of its decoder."""
    if path.is_fifo():
        raise ValueError("it is a pipe, not a file")
    image = Image.open(path)
    if image.format in ("JPEG", "MPO"):
        image.close()
        raise ValueError("it is a JPEG, whose pixels are not exact: save masks as PNG")
    return image


def mask_values(image: ImageFile) -> Array:
    """Return the values of an open mask `(H, W)`, of a palette its indices; raises ValueError if it has no ids."""
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise ValueError(f"it is {image.mode}, where ids are expected")
    packing = image.tile[0][3] if image.tile else None  # decoding empties it
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
    rows = _read_rows(path)
    classes = [row for row in rows if row.name.casefold() not in IGNORED_NAMES]
    if not 2 <= len(classes) <= OUTSIDE:
        what = f"the table has {len(classes)} classes that are not ignored"
        raise UserError(what, str(path), f"list 2 to {OUTSIDE} classes")
    for column, checked in (("id", rows), ("colour", rows), ("name", classes)):
        cells = [getattr(row, column) for row in checked]
        if None in cells and any(cell is not None for cell in cells):
            name = printable(checked[cells.index(None)].name)
            raise UserError(f"'{name}' has no {column}, others have one", str(path), TIP)
        if twice := [cell for cell in cells if cell is not None and cells.count(cell) > 1]:
            raise UserError(f"two classes have the same {column}: {printable(str(twice[0]))}", str(path), TIP)
    place = {row.name: number for number, row in enumerate(classes)}
    ids = {row.id: place.get(row.name, IGNORED) for row in rows if row.id is not None}
    colours = {row.colour: place.get(row.name, IGNORED) for row in rows if row.colour is not None}
    if not (ids or colours):
        raise UserError("the table has neither ids nor colours", str(path), TIP)
    palette = [row.colour for row in classes if row.colour is not None] or default_palette(len(classes))
    return ClassTable(list(place), palette, {255: IGNORED} | ids if ids else None, colours or None)


def _read_rows(path: Path) -> list[_Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text else ",")
        lines = [[cell.strip() for cell in line] for line in reader if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the class table can't be read: {error}", str(path), TIP) from error
    header = [cell.lower().replace("color", "colour") for cell in lines[0]] if lines else []
    header, lines = (header, lines[1:]) if "name" in header else (list(COLUMNS), lines)
    rows = []
    for number, line in enumerate(lines, 1):
        cells = dict.fromkeys(COLUMNS, "") | dict(zip(header, line, strict=False))
        name, value, colour = cells["name"], cells["id"], cells["colour"]
        if not name:
            raise UserError(f"class {number} of the table has no name", str(path), TIP)
        if value and not (value.isdecimal() and int(value) < IDS):
            what = f"id '{printable(value)}' of '{printable(name)}' is not a whole number below {IDS}"
            raise UserError(what, str(path), TIP)
        levels = _levels(colour)
        if levels is None and colour:
            what = f"'{printable(colour)}' of '{printable(name)}' is not a colour"
            raise UserError(what, str(path), "write it as #804080, or as 128 64 128")
        rows.append(_Row(name, int(value) if value else None, levels))
    return rows


def _levels(text: str) -> Colour | None:
    """Parse `#rrggbb`, or three numbers separated by spaces."""
    if re.fullmatch("#[0-9a-fA-F]{6}", text):
        red, green, blue = bytes.fromhex(text[1:])
    elif re.fullmatch(r"\d{1,3} +\d{1,3} +\d{1,3}", text):
        red, green, blue = map(int, text.split())
    else:
        return None
    return (red, green, blue) if max(red, green, blue) < 256 else None
