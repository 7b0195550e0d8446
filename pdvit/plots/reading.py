"""What `pdvit analyze` left behind, read and checked; what is missing is said with the command that makes it."""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from pdvit.errors import UserError

TABLE = "analysis.csv"
TYPES = {"layer": str, "depth": int, "metric": str, "mean": float, "std": float, "ci95": float, "images": int}
Arrays = dict[str, np.ndarray]


def read_analysis(run: Path, metrics: Iterable[str] = (), group: str = "similarity") -> pd.DataFrame:
    """Read analysis.csv, of which the figure needs all of `metrics`, those of `group`.

    Raises:
        UserError: it is damaged, or a metric was not measured.
    """
    file = run / TABLE
    try:
        table = pd.read_csv(file, keep_default_na=False, na_values=[""]).astype({**TYPES, "tokens": int})
        if table.empty or table["mean"].isna().any() or table.duplicated(["depth", "metric"]).any():
            raise ValueError("it has no values, or several of one layer and metric")
    except (OSError, ValueError, KeyError, TypeError) as error:  # pandas words these for programmers
        what = "the analysis is damaged, or not one of pdvit analyze"
        raise UserError(what, str(file), f"measure it again: pdvit analyze {checkpoint_of(run)}") from error
    for metric in metrics:
        if not (table["metric"] == metric).any():
            raise unmeasured(run, group, file, f"the analysis has no values of the metric {metric}")
    return table


def read_curves(run: Path, group: str, names: Iterable[str]) -> Arrays:
    """Read analysis/GROUP.npz, which has to have arrays of each of these names (`histogram/block 1`, or `matrix`).

    Raises:
        UserError: the group was not measured, or the file is damaged.
    """
    arrays = read_arrays(run, group, unmeasured(run, group, run / "analysis" / f"{group}.npz"))
    for name in names:
        if not any(key == name or key.startswith(f"{name}/") for key in arrays):
            raise unmeasured(run, group, run / "analysis" / f"{group}.npz", f"the file has no arrays '{name}'")
    return arrays


def read_arrays(run: Path, stem: str, absent: UserError) -> Arrays:
    """Read analysis/STEM.npz; `absent` is raised where it is missing or damaged. Nothing in it is unpickled."""
    file = run / "analysis" / f"{stem}.npz"
    if not file.is_file():
        raise absent
    try:
        with np.load(file, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError("the file is damaged", str(file), absent.tip) from error


def layers_of(arrays: Arrays, name: str) -> list[str]:
    """Return the layers that have a curve `NAME/LAYER`, in the order they were measured."""
    return [key.partition("/")[2] for key in arrays if key.startswith(f"{name}/")]


def unmeasured(run: Path, group: str, file: Path, what: str = "") -> UserError:
    """Return the error of a group of metrics that the analysis has not got."""
    tip = f"measure it: pdvit analyze {checkpoint_of(run)} --metrics {group} (with all groups that are to stay)"
    return UserError(what or f"the analysis has no {group}", str(file), tip)


def checkpoint_of(run: Path) -> str:
    """Return what `pdvit analyze` measured: the run itself, or what analysis.json names."""
    try:
        facts = json.loads((run / "analysis" / "analysis.json").read_text(encoding="utf-8"))
        return str(facts["checkpoint"])
    except (OSError, ValueError, LookupError, TypeError):
        return str(run)
