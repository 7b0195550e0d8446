"""Class tables: the class of each value or colour of a mask. From ids, or from files with id, name and colour."""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION
from torch import Tensor

from pdvit.data.sources import first_names
from pdvit.data.sources.split import upright
from pdvit.files import read_text, reading

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
    """The classes of a set of masks, in the order of their training ids."""

    names: list[str]
    palette: list[Colour]
    ids: Mapping[int, int]  # training id by value of a mask, 255 for ignored values; empty: masks are read by colour
    colours: Mapping[int, int]  # training id by colour, 0xrrggbb; empty: masks with colours are refused

    @classmethod
    def of_ids(
        cls, names: Mapping[int, str], ignored: Iterable[int] = (), palette: list[Colour] | None = None
    ) -> "ClassTable":
        """Return the table of masks whose values are ids (id -> name); 255 is ignored unless it is a class."""
        ids = dict.fromkeys((255, *ignored), IGNORED) | {value: place for place, value in enumerate(names)}
        return cls(list(names.values()), palette or default_palette(len(names)), ids, {})

    def read(self, image: Image.Image) -> Tensor:
        """Decode an open mask: training ids, uint8 `(H, W)`; raises ValueError for values outside of the table."""
        coloured = bool(self.colours) and (not self.ids or image.mode in ("RGB", "RGBA"))
        values = mask_values(image, coloured)
        found: Array = self._lookups[coloured][values]
        if len(outside := np.unique(values[found == OUTSIDE]).tolist()):
            listed = first_names([f"#{value:06x}" if coloured else str(value) for value in outside], 10)
            unit = "colour" if coloured else "id"
            raise ValueError(f"outside of the table of {len(self.names)} classes: {unit} {listed}")
        return torch.from_numpy(found)

    @cached_property
    def _lookups(self) -> list[Array]:
        """The training ids of all ids and of all colours."""
        lookups = list[Array]()
        for size, places in ((IDS, self.ids), (COLOURS, self.colours)):
            lookups.append(np.full(size if places else 0, OUTSIDE, np.uint8))
            lookups[-1][list(places)] = list(places.values())
        return lookups


def mask_values(image: Image.Image, coloured: bool = False) -> Array:
    """Decode an open mask `(H, W)`: its values (of a palette the indices), or colours, 0xrrggbb; raises ValueError."""
    with image:
        if image.format in ("JPEG", "MPO"):
            raise ValueError("it is a JPEG, whose pixels are not exact: save masks as PNG")
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0 and image.mode != "1":
            raise ValueError("it is a TIFF of which 0 is white, and Pillow turns its values round: save masks as PNG")
        if coloured:
            return np.array(upright(image).convert("RGB")) @ np.array([2**16, 2**8, 1], np.int32)
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise ValueError(f"it is {image.mode}, where ids are expected: there is no table with colours")
        tile: Any = getattr(image, "tile", None)
        packing = tile[0][3] if tile else None  # decoding empties it
        name = packing[0] if isinstance(packing, tuple) else packing  # of TIFF, of PNG
        # Pillow stretches grey values of 2 and 4 bits to 0 to 255
        values = np.array(upright(image)) // {"L;2": 85, "L;4": 17}.get(str(name)[:3], 1)
    if image.mode.startswith("I") and (values.min(initial=0) < 0 or values.max(initial=0) >= IDS):
        raise ValueError(f"ids from {values.min()} to {values.max()} are not whole numbers below {IDS}")
    return values.astype(np.uint16) if values.dtype != np.uint8 else values


def default_palette(count: int) -> list[Colour]:
    """Return distinct colours, those of Pascal VOC: the bits of the class number, spread over the channels."""
    channels = np.arange(count)[:, None] >> np.arange(3)
    levels = np.sum([(channels >> 3 * bit & 1) << 7 - bit for bit in range(8)], axis=0)
    return [(red, green, blue) for red, green, blue in levels.tolist()]


def read_table(path: Path) -> ClassTable:
    """Read a class table; the columns of a file without header are id, name and optionally colour. Raises UserError.

    Without ids it is for masks that are colours. Unlabelled, Void, Ignored and 255 (unless it is a class) are ignored.
    """
    with reading(path, TIP, "the class table can't be read"):
        text = read_text(path)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text else ",")
        return _parse([[cell.strip() for cell in line] for line in reader if any(line)])


def _parse(lines: list[list[str]]) -> ClassTable:
    """Return the table of these cells; raises ValueError for cells that are missing, invalid or there twice."""
    header = [cell.lower().replace("color", "colour") for cell in lines[0]] if lines else []
    columns, lines = (header, lines[1:]) if "name" in header else (list(COLUMNS), lines)
    rows = [dict.fromkeys(COLUMNS, "") | dict(zip(columns, line, strict=False)) for line in lines]
    names = [row["name"] for row in rows if row["name"].casefold() not in IGNORED_NAMES]
    if not 2 <= len(names) <= OUTSIDE:
        raise ValueError(f"the table has {len(names)} classes that are not ignored, and needs 2 to {OUTSIDE}")
    filled = [column for column in ("id", "colour") if any(row[column] for row in rows)]
    if not filled:
        raise ValueError("the table has neither ids nor colours")
    if "" in names:
        raise ValueError("a class of the table has no name")
    numbers: dict[str, list[Any]] = {c: [_number(row["name"], c, row[c]) for row in rows] for c in filled}
    for column, cells in (numbers | {"name": names}).items():
        if twice := [cell for cell in cells if cells.count(cell) > 1]:
            raise ValueError(f"two classes have the same {column}: {twice[0]}")
    place = {name: number for number, name in enumerate(names)}
    places = [place.get(row["name"], IGNORED) for row in rows]
    ids, colours = (dict(zip(numbers.get(column, []), places, strict=False)) for column in ("id", "colour"))
    palette = [(colour >> 16, colour >> 8 & 255, colour & 255) for colour, at in colours.items() if at != IGNORED]
    return ClassTable(names, palette or default_palette(len(names)), {255: IGNORED} | ids if ids else {}, colours)


def _number(name: str, column: str, cell: str) -> int:
    """Return an id, or a colour as 0xrrggbb; raises ValueError for another cell."""
    if column == "id":
        if cell.isdecimal() and int(cell) < IDS:
            return int(cell)
        raise ValueError(f"id '{cell}' of '{name}' is not a whole number below {IDS}")
    if re.fullmatch("#[0-9a-fA-F]{6}", cell):
        return int(cell[1:], 16)
    levels = [int(level) for level in cell.split()] if re.fullmatch(r"\d{1,3}( +\d{1,3}){2}", cell) else [256]
    if max(levels) > 255:
        raise ValueError(f"colour '{cell}' of '{name}' is not like #804080 or 128 64 128")
    return int.from_bytes(levels, "big")
