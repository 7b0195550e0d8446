"""The rounds of a measurement in a CSV file: a row for each, with what was measured on what."""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def append(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file, which begins with the names of its columns; one that has others is left as it is."""
    columns = list(columns)
    if file.exists():
        with file.open(newline="") as before:
            there = next(csv.reader(before), [])
        if there != columns:
            sys.exit(f"{file} has other columns ({', '.join(there)}): nothing is written; --csv names another file")
    with file.open("a", newline="") as after:
        writer = csv.DictWriter(after, columns)
        if not after.tell():
            writer.writeheader()
        writer.writerows(rows)
