"""Reads files that others may have written: with bounds, and every error becomes a UserError."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdvit.errors import UserError

MAX_TEXT = 2**24  # bytes; config.json and summary.json of 21,841 classes have one or two million


@contextmanager
def reading(file: Path | str, tip: str, what: str = "") -> Iterator[None]:
    """Turn any error inside into a UserError at `file` (a path, or another name): parsers raise nearly anything."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        what = what or f"{Path(file).name} is missing or damaged"
        raise UserError(f"{what}: {reason_of(error)}", str(file), tip) from error


def reason_of(error: Exception) -> str:
    """Return the first line of an error's text, or its type: the values that an error holds can be of any size."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    small = all(isinstance(value, str | bytes | int) for value in error.args)
    text = str(error).strip().partition("\n")[0] if small else ""
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__} {text}".strip()


def read_text(file: Path) -> str:
    """Return the text of a file; raises OSError, or ValueError if it is too large or not UTF-8 (a mark is left out)."""
    with file.open("rb") as opened:
        content = opened.read(MAX_TEXT + 1)  # some files have no end
    if len(content) > MAX_TEXT:
        raise ValueError(f"it is larger than {MAX_TEXT >> 20} MiB")
    return content.decode("utf-8-sig")


def read_json(source: Path | str) -> dict[str, Any]:
    """Return the table in a JSON file, or in a text; for use in `reading`."""
    table = json.loads(read_text(source) if isinstance(source, Path) else source)
    if not isinstance(table, dict):
        raise TypeError(f"it holds a {type(table).__name__}, not a table")
    return table
