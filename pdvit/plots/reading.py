"""Reads the files of `pdvit analyze`; errors name the command that makes what is missing."""

import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from pdvit.errors import UserError

TYPES = {"layer": str, "depth": int, "metric": str, "mean": float, "std": float, "ci95": float, "images": int}
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class AnalyzedRun:
    """An analysis to draw.

    Attributes:
        name: differs from those of other runs in a figure.
        table: as analysis.csv.
        curves: the arrays of analysis/GROUP.npz by group, called `NAME/LAYER`, or `NAME` without layers.
    """

    name: str
    table: pd.DataFrame
    curves: Mapping[str, Arrays] = field(default_factory=dict)

    def curve(self, group: str, name: str) -> Arrays:
        """Return the arrays `NAME/LAYER` of a group by layer, in the order in which they were measured."""
        start = f"{name}/"
        return {key.removeprefix(start): array for key, array in self.curves[group].items() if key.startswith(start)}


def read_run(
    folder: Path, name: str, group: str = "similarity", metrics: Iterable[str] = (), curves: Iterable[str] = ()
) -> AnalyzedRun:
    """Read analysis.csv, and analysis/GROUP.npz if `curves` are named.

    Args:
        folder: run directory, or folder of an analysis.
        name: of the run in the figure.
        group: `pdvit analyze --metrics GROUP` measures what the figure needs.
        metrics: needed in analysis.csv.
        curves: needed in the file of the group, as `NAME` or `NAME/LAYER`.

    Raises:
        UserError: a file is damaged, or the group was not measured.
    """
    arrays: dict[str, Arrays] = {}
    tip = f"measure it: pdvit analyze {checkpoint_of(folder)} --metrics {group} (with all groups that are to stay)"
    if curves:
        arrays[group] = read_arrays(folder, group, tip)
        for curve in curves:
            if not any(key.partition("/")[0] == curve for key in arrays[group]):
                raise UserError(f"the file has no arrays '{curve}'", str(folder / "analysis" / f"{group}.npz"), tip)
        if group == "cka" and (folder / "analysis" / "cka_between.npz").is_file():
            arrays["cka_between"] = _read_between(folder, tip)
    table = _read_table(folder)
    for metric in metrics:
        if not (table["metric"] == metric).any():
            raise UserError(f"the analysis has no values of the metric {metric}", str(folder / "analysis.csv"), tip)
    return AnalyzedRun(name, table, arrays)


def _read_table(folder: Path) -> pd.DataFrame:
    file = folder / "analysis.csv"
    try:
        table = pd.read_csv(file, keep_default_na=False, na_values=[""]).astype({**TYPES, "tokens": int})
        if table.empty or table["mean"].isna().any() or table.duplicated(["depth", "metric"]).any():
            raise ValueError("it has no values, or several of one layer and metric")
    except (OSError, ValueError, KeyError, TypeError) as error:  # pandas' own messages are for programmers
        what = "the analysis is damaged, or not one of pdvit analyze"
        raise UserError(what, str(file), f"measure it again: pdvit analyze {checkpoint_of(folder)}") from error
    return table


def _read_between(folder: Path, tip: str) -> Arrays:
    """Read analysis/cka_between.npz: `layers`, and for each other model `matrix/OTHER` and `layers/OTHER`."""
    arrays = read_arrays(folder, "cka_between", tip)
    for matrix in (key for key in arrays if key.startswith("matrix/")):
        sides = [arrays.get("layers", ()), arrays.get(matrix.replace("matrix/", "layers/", 1), ())]
        if arrays[matrix].shape != tuple(map(len, sides)):
            raise UserError("the file is damaged", str(folder / "analysis" / "cka_between.npz"), tip)
    return arrays


def read_arrays(folder: Path, stem: str, tip: str) -> Arrays:
    """Read analysis/STEM.npz, without unpickling. Raises UserError with the tip if it is missing or damaged."""
    file = folder / "analysis" / f"{stem}.npz"
    try:
        with np.load(file, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        what = "the file is damaged" if file.is_file() else f"the analysis has no {file.name}"
        raise UserError(what, str(file), tip) from error


def checkpoint_of(folder: Path) -> str:
    """Return the analyzed checkpoint: the one that analysis.json names, or the run itself."""
    try:
        metadata = json.loads((folder / "analysis" / "analysis.json").read_text(encoding="utf-8"))
        return str(metadata["checkpoint"])
    except (OSError, ValueError, LookupError, TypeError):
        return str(folder)
