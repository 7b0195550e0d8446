"""A CSV table of images: path, label and optionally split."""

import csv
import io
import os
from collections import Counter
from pathlib import Path

import torch

from pdvit.config.schema import DataConfig
from pdvit.data.sources.split import FileSplit, Source, Split, assemble, choose_splits
from pdvit.errors import UserError, printable
from pdvit.files import reading

COLUMNS = ("path", "label", "split")
TIP = "name them with --train-split and --val-split; without a split column a tenth of each class is held out"
Row = dict[str, str]


def read_csv(data: DataConfig, training: bool = True) -> Source:
    """Read a table with a header; paths are relative to it, labels are texts or whole numbers.

    Classes are the labels of train, or of all if there is no train, sorted as numbers if all are whole numbers, else as
    texts. Raises UserError for a missing column, an empty or negative label, and a label that train lacks.
    """
    path = Path(os.path.expanduser(data.source))
    rows = _rows(path)
    counts = Counter(row["split"] for row in rows.values())
    whole = set(counts) == {""} and not (data.train_split or data.val_split)
    chosen = {"train" if training else "all": ""}
    if not whole:
        chosen = choose_splits([*filter(None, counts)], data, str(path), TIP, training)
    labelled = [chosen["train"]] if "train" in chosen else [*chosen.values()]
    labels = {row["label"] for row in rows.values() if row["split"] in labelled}
    classes = sorted(labels, key=int) if all(map(str.isdecimal, labels)) else sorted(labels)
    numbers = {name: number for number, name in enumerate(classes)}
    splits: dict[str, Split] = {}
    for role, name in chosen.items():
        part = {line: row for line, row in rows.items() if row["split"] == name}
        if unknown := next((line for line, row in part.items() if row["label"] not in numbers), None):
            what = f"label '{rows[unknown]['label']}' of {role} is none of the {len(classes)} labels of train"
            raise UserError(what, f"{path}, line {unknown}", "add it to train, or remove its rows")
        files = [path.parent / row["path"] for row in part.values()]
        splits[role] = FileSplit(files, torch.tensor([numbers[row["label"]] for row in part.values()]))
    unused = [name for name in counts if name not in chosen.values()]
    notes = [f"{counts[name]:,} rows of split '{printable(name)}' are not used" for name in unused]
    return assemble(path.stem, classes, splits, data, training).noting(*notes)


def _rows(path: Path) -> dict[int, Row]:
    """Return the cells of each row by its line number; raises UserError if the table is malformed."""
    rows: dict[int, Row] = {}
    with reading(path, "save it as CSV in UTF-8", "the table can't be read"):
        lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        header = [name.strip().lower() for name in next(lines, [])]
        if missing := [name for name in COLUMNS[:2] if name not in header]:
            what = f"the table has no column '{missing[0]}' (it has: {', '.join(header) or 'nothing'})"
            raise UserError(what, str(path), "begin it with the line path,label or path,label,split")
        if twice := [name for name in COLUMNS if header.count(name) > 1]:
            raise UserError(f"the table has two columns '{twice[0]}'", str(path), "rename or remove one of them")
        for values in filter(any, lines):
            cells = dict(zip(header, values, strict=False))
            row = rows[lines.line_num] = {name: cells.get(name, "").strip() for name in COLUMNS}
            where, label = f"{path}, line {lines.line_num}", row["label"]
            if any(values[len(header) :]):
                raise UserError("a row has more cells than the header", where, 'quote cells with commas: "a, b"')
            if not (row["path"] and label):
                raise UserError("a row without path or label", where, "fill it in, or remove the row")
            if label.startswith("-") and label[1:].isdecimal():
                raise UserError(f"label {label} is below 0", where, "number classes from 0, or remove the row")
    if not rows:
        raise UserError("the table has no rows", str(path), "add a line for each image")
    return rows
