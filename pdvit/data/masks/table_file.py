"""Tables of classes in files: TSV or CSV with id, name and colour."""

import csv
import io
import re
from pathlib import Path

from pdvit.data.masks.table import IGNORED, OUTSIDE, VALUES, ClassTable, Colour, default_palette
from pdvit.data.sources.split import printable
from pdvit.errors import UserError

COLUMNS = ("id", "name", "colour")
# Classes that are ignored, by their names.
UNLABELLED = ("unlabelled", "unlabeled", "void", "ignore", "ignored")
TIP = "write a line for each class: id TAB name, or id TAB name TAB #804080; without ids begin with name TAB colour"


def read_table(path: Path) -> ClassTable:
    """Read a table of classes; without a header line its columns are id, name and perhaps colour.

    A table without ids says what colours mean. Classes named Unlabelled, Void or Ignored are ignored, and so is the
    value 255 unless it is a class. Raises UserError where it can't be read so.
    """
    rows = _rows(path)
    known = [row for row in rows if row["name"].casefold() not in UNLABELLED]
    if not 2 <= len(known) <= OUTSIDE:
        what = f"the table has {len(known)} classes that are not ignored"
        raise UserError(what, str(path), f"it has to have 2 to {OUTSIDE}")
    place = {row["name"]: number for number, row in enumerate(known)}
    ids = {_id(row, path): place.get(row["name"], IGNORED) for row in rows if row["id"]}
    colours = {_colour(row, path): place.get(row["name"], IGNORED) for row in rows if row["colour"]}
    for what, values, of in (("id", ids, rows), ("colour", colours, rows), ("name", place, known)):
        if values and len(values) != len(of):
            missing = next((row["name"] for row in of if not row[what]), None)
            written = [row[what] for row in of]
            twice = next((text for text in written if written.count(text) > 1), "written in two ways")
            fault = f"two classes have the same {what}, {printable(twice)}"
            if missing is not None:
                fault = f"'{printable(missing)}' has no {what}, where others do"
            raise UserError(fault, str(path), TIP)
    if not (ids or colours):
        raise UserError("the table has neither ids nor colours", str(path), TIP)
    palette = [_colour(row, path) for row in known] if colours else default_palette(len(known))
    return ClassTable(list(place), palette, {255: IGNORED} | ids if ids else None, colours or None)


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the cells of each class, with all three columns; UserError where the file is no table."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = "\t" if "\t" in text else ","
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the table of classes can't be read: {error}", str(path), TIP) from error
    header = [cell.strip().lower().replace("color", "colour") for cell in rows[0]] if rows else []
    if "name" in header:
        rows = rows[1:]
    else:
        header = list(COLUMNS)
    cells = [dict(zip(header, (cell.strip() for cell in row), strict=False)) for row in rows]
    whole = [{column: row.get(column, "") for column in COLUMNS} for row in cells]
    if nameless := next((number for number, row in enumerate(whole, 1) if not row["name"]), None):
        raise UserError(f"class {nameless} of the table has no name", str(path), TIP)
    return whole


def _id(row: dict[str, str], path: Path) -> int:
    if not (row["id"].isdecimal() and int(row["id"]) < VALUES):
        what = f"id '{printable(row['id'])}' of '{printable(row['name'])}' is no whole number below {VALUES}"
        raise UserError(what, str(path), TIP)
    return int(row["id"])


def _colour(row: dict[str, str], path: Path) -> Colour:
    """Read `#rrggbb`, or three numbers with spaces between."""
    text = row["colour"]
    levels = [text[at : at + 2] for at in (1, 3, 5)] if re.fullmatch("#[0-9a-fA-F]{6}", text) else []
    numbers = [int(level, 16) for level in levels] or [int(part) for part in re.findall(r"\d+", text)]
    if (not levels and not re.fullmatch(r"\d{1,3} +\d{1,3} +\d{1,3}", text)) or max(numbers) > 255:
        what = f"'{printable(text)}' is no colour of '{printable(row['name'])}'"
        raise UserError(what, str(path), "write it as #804080, or as 128 64 128")
    return numbers[0], numbers[1], numbers[2]
