"""Reads the files that figures are drawn from. Errors name the command that makes them."""

import csv
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from pdvit.definitions import DEFAULT
from pdvit.errors import command
from pdvit.files import read_json, reading

MAX_ARRAYS = 2**30  # bytes of a group when unpacked; maps.npz, the largest, has some ten million
TYPES = {"layer": str, "depth": int, "metric": str, "mean": float, "std": float, "ci95": float, "images": int}
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class AnalyzedRun:
    """An analysis to draw."""

    name: str  # differs from those of other runs in a figure
    table: pd.DataFrame  # as analysis.csv
    # The arrays of analysis/GROUP.npz by group, called `NAME/LAYER`, or `NAME` without layers.
    curves: Mapping[str, Arrays] = field(default_factory=dict)

    def curve(self, group: str, name: str) -> Arrays:
        """Return the arrays `NAME/LAYER` of a group by layer, in the order in which they were measured."""
        start = f"{name}/"
        return {key.removeprefix(start): array for key, array in self.curves[group].items() if key.startswith(start)}


def read_text_table(file: Path) -> pd.DataFrame:
    """Read a CSV file, all cells as text: a class may be called NA or 1. Raises ValueError or csv.Error."""
    with file.open(encoding="utf-8", errors="replace", newline="") as opened:
        head, *rows = (row for row in csv.reader(opened, strict=True) if row)
    table = pd.DataFrame(rows, columns=head, dtype=object)
    if table.empty or table.isna().any(axis=None):
        raise ValueError("it has no rows, or incomplete ones")
    return table


def read_run(folder: Path, name: str, group: str = "similarity") -> AnalyzedRun:
    """Read analysis.csv of a run or of an analysis, and the arrays of a group if it has some; raises UserError."""
    table_file, arrays = folder / "analysis.csv", {}
    with reading(table_file, f"measure it again: {analyze_again(folder)}"):
        table = pd.read_csv(table_file, keep_default_na=False, na_values=[""]).astype({**TYPES, "tokens": int})
        if table.empty or table["mean"].isna().any() or table.duplicated(["depth", "metric"]).any():
            raise ValueError("it has no values, or several of one layer and metric")
    for file in (folder / "analysis").glob(f"{group}*.npz"):  # of CKA also cka_between.npz
        arrays[file.stem] = read_arrays(file, f"measure it again: {analyze_again(folder, group)}")
    return AnalyzedRun(name, table, arrays)


def read_arrays(file: Path, tip: str) -> Arrays:
    """Read the arrays of a .npz file, without unpickling. Raises UserError with the tip."""
    with reading(file, tip), zipfile.ZipFile(file) as archive, np.load(file, allow_pickle=False) as opened:
        if sum(item.file_size for item in archive.infolist()) > MAX_ARRAYS:
            raise ValueError(f"it unpacks to more than {MAX_ARRAYS >> 30} GiB")
        return dict(opened)


def analyze_again(folder: Path, group: str = "similarity", explore: bool = False) -> str:
    """Return the command that measures again what a folder has, on the same images, and one more group, or maps."""
    words, measured = [checkpoint_of(folder)], list(DEFAULT)
    with suppress(Exception):  # missing, damaged, or of an older version
        facts = read_json(folder / "analysis" / "analysis.json")
        words, measured = [*map(str, facts["arguments"])], [*map(str, facts["groups"])]
    own = (folder / "run.toml").is_file() or os.path.abspath(words[0]) == os.path.abspath(folder)
    words = [str(folder), *words[1:]] if own else [*words, "--out", str(folder)]
    metrics = [*dict.fromkeys([*measured, group])]
    words += [] if metrics == list(DEFAULT) else ["--metrics", ",".join(metrics)]
    words += ["--explore"] if explore or (folder / "analysis" / "maps.npz").exists() else []
    return command("analyze", *words)


def eval_again(folder: Path) -> str:
    """Return the command that evaluates the checkpoint of a folder of results."""
    return command("eval", checkpoint_of(folder))


def checkpoint_of(folder: Path) -> str:
    """Return the checkpoint of a folder of results: the run itself, or the one that its JSON names."""
    for file in () if (folder / "run.toml").is_file() else ("analysis/analysis.json", "eval.json"):
        with suppress(Exception):  # missing or damaged
            return str(read_json(folder / file)["checkpoint"])
    return str(folder)
