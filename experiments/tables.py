"""The tables of an experiment: a row for each cell of a sweep that ended, and one for each layer of each."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd

from pdvit.tracking.run_directory import write_file

# In the directory of a run: what its layers are like, by `when` (before or after training).
LAYERS, NUMBERS = "layers.csv", ["similarity", "effective_rank"]
ENDED = ("finished", "failed")
RATE, SEED = "optim.lr", "run.seed"
# A record of the training loss counts as a spike above so many times the median of so many records before it.
SPIKE, BEFORE = 3, 20
# The folders of an absolute path.
FOLDERS = re.compile(r"(?<![\w.])/(?=[^\s/])(?:[^\s/'\"]+/)*")
# Texts that may look like numbers; settings, whose names have a dot, are others.
TEXTS = ("name", "variant", "reason", "commit", "torch")
Row = dict[str, Any]


def spikes(losses: Sequence[float | None]) -> int:
    """Count the records above three times the median of the 20 before them, or not finite (None)."""
    known = [[loss for loss in losses[max(0, at - BEFORE) : at] if loss is not None] for at in range(len(losses))]
    return sum(
        loss is None or (bool(before) and loss > SPIKE * median(before))
        for loss, before in zip(losses, known, strict=True)
    )


def facts_of(run: Path) -> Row:
    """Return what results.csv has of a run beside its row of cells.csv."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    losses = [None if record["skipped"] else record["loss"] for record in records if record["kind"] == "train"]
    found: Row = {}
    for record in (record for record in records if record["kind"] == "eval"):
        name = "miou" if "miou" in record else "accuracy"
        found = {f"{name}_val": record[name]}
    found |= {"loss_spikes": spikes(losses)}
    if (run / LAYERS).is_file():
        table = pd.read_csv(run / LAYERS)
        for when, end in (("after", ""), ("before", "_before")):
            for place in ("block", "norm"):
                rows = table[(table["when"] == when) & table["layer"].str.startswith(place)]
                for layer in rows.tail(1).to_dict("records"):
                    found |= {f"similarity_{place}{end}": layer["similarity"]}
                    found |= {f"rank_{place}{end}": layer["effective_rank"]}
    if (run / "environment.json").is_file():
        made = json.loads((run / "environment.json").read_text())
        found |= {"cores": made["cores"], "threads": made.get("threads"), "torch": made["packages"]["torch"]}
    return found


def cells_of(sweep: Path) -> list[Row]:
    """Return the rows of cells.csv of the cells that ended, with the facts of their runs."""
    with (sweep / "cells.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] in ENDED]
    return [row | facts_of(sweep / row["name"]) for row in rows]


def layers_of(sweep: Path, cells: Sequence[Row]) -> Iterator[Row]:
    """Yield a row for each layer of each cell that was measured, after training and before."""
    for cell in cells:
        setting = {name: cell[name] for name in cell if name == "variant" or "." in name}
        if (file := sweep / cell["name"] / LAYERS).is_file():
            table = pd.read_csv(file)
            yield from ({**setting, **row} for row in table[["when", "layer", "depth", *NUMBERS]].to_dict("records"))


def write_table(file: Path, rows: Sequence[Row]) -> None:
    """Write rows with five digits and without folders of this machine."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: told(name, value) for name, value in row.items()} for row in rows)
    write_file(file, text.getvalue())
    print(f"written  {file} ({len(rows)} rows)")


def told(name: str, value: Any) -> str:
    """Return a cell of a table: a setting or a text as it is, but for folders; other numbers with five digits."""
    text = FOLDERS.sub("", "" if value is None else str(value))
    if "." in name or name in TEXTS or text.isdigit():
        return text
    try:
        return f"{float(text):.5g}"
    except ValueError:
        return text


def best_rates(cells: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float, bool]]:
    """Return by setting the best learning rate on validation, of equals the lower; its score; is it the grid's edge?

    The score is the mean over seeds; a rate at which a run failed or has no score is none, and a setting with no other
    is left out.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for cell in cells:
        others = [f"{name}={cell[name]}" for name in cell if "." in name and name not in (RATE, SEED)]
        score = max((float(cell[name]) for name in ("miou_val", "accuracy_val") if cell.get(name)), default=math.nan)
        scores = found.setdefault(", ".join([cell["variant"], *others]), {}).setdefault(float(cell[RATE]), [])
        scores.append(score if cell["status"] == "finished" and not math.isnan(score) else -math.inf)
    best = {}
    for setting, rates in found.items():
        score, negative = max((mean(scores), -rate) for rate, scores in rates.items())
        if score > -math.inf:
            best[setting] = (-negative, score, -negative in (min(rates), max(rates)))
    return best
