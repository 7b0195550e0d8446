"""The rounds of a measurement in a CSV file: a row for each, with what was measured on what."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def append(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file, which begins with the names of its columns; where one has others, to a new one beside it."""
    columns = list(columns)
    if file.exists():
        with file.open(newline="") as before:
            there = next(csv.reader(before), columns)
        if there != columns:
            new = file.with_stem(f"{file.stem}-new")
            print(f"{file.name} has other columns: the rounds are added to {new.name}")
            return append(new, columns, rows)
    with file.open("a", newline="") as after:
        writer = csv.DictWriter(after, columns)
        if not after.tell():
            writer.writeheader()
        writer.writerows(rows)
