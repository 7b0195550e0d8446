"""A sweep in numbers: cells.csv, mean and spread over seeds by setting, paired differences from a baseline."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pdvit.errors import UserError, closest
from pdvit.plots.statistics import mean_and_std, paired

CELLS, SEED, VARIANT, FINISHED = "cells.csv", "run.seed", "variant", "finished"
# What is compared unless a metric is named: the first that is there.
METRICS = ("accuracy", "miou")
# Shares that people read in percent.
PERCENT = ("accuracy", "accuracy_top5", "miou")
# Cells that a note names one by one.
NAMED = 8
Setting = tuple[str, ...]


@dataclass(frozen=True)
class SweepSummary:
    """A sweep by setting.

    Attributes:
        table: one row per setting: `setting`, a column for each of `axes`, n, left_out, mean, std, difference, low and
            high (95 % confidence), pairs, and the value of each seed (`seed 0`).
        axes: what was varied: `variant`, or dotted names of settings.
        metric: what is compared.
        baseline: what differences are taken from; empty where there is one setting only.
        left_out: cells that give no number, and why.
        cells: how many there are in all.
    """

    table: pd.DataFrame
    axes: list[str]
    metric: str
    baseline: str
    left_out: list[str]
    cells: int

    @property
    def percent(self) -> bool:
        """Whether the metric is a share that people read in percent."""
        return self.metric in PERCENT


def read_cells(place: Path) -> pd.DataFrame:
    """Read cells.csv of a sweep's folder, or a file like it, everything as text; UserError where it can't be read."""
    file = place / CELLS if place.is_dir() else place
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened, strict=True))
        table = pd.DataFrame(rows, dtype=object)
        needed = {"cell", "status"} - set(table.columns)
        if table.empty or needed or None in table.columns or table.isna().any(axis=None):
            raise ValueError("it has no rows, or lacks columns")
    except FileNotFoundError as error:
        tip = "name the folder of a sweep: run directories and cells.csv, one row per run"
        raise UserError(f"there is no {file.name}", str(file.parent), tip) from error
    except (OSError, ValueError, csv.Error) as error:
        tip = "it needs one row per run, and the columns cell and status"
        raise UserError("the table of cells is damaged", str(file), tip) from error
    return table


def summarise(cells: pd.DataFrame, metric: str | None = None, baseline: str | None = None) -> SweepSummary:
    """Return mean and spread over seeds for each setting, and paired differences from the baseline.

    Args:
        cells: as `read_cells` returns them.
        metric: a column of numbers; unset: accuracy or miou.
        baseline: `KEY=VALUE`, several with commas between, or a value of the first axis alone. Each setting is compared
            with the one that has these values and is like it otherwise. Unset: the first value of the first axis.

    Raises:
        UserError: there is no such metric or baseline, or two cells have the same setting and seed.
    """
    metric = _metric(cells, metric)
    axes = axes_of(cells)
    chosen = _baseline(cells, axes, baseline)
    found: dict[Setting, dict[str, float]] = {}
    left_out: dict[Setting, int] = {}
    reasons = []
    for cell in cells.to_dict("records"):
        setting = tuple(str(cell[axis]) for axis in axes)
        values, seed = found.setdefault(setting, {}), str(cell.get(SEED, ""))
        value = _number(cell[metric])
        if cell["status"] != FINISHED or value is None:
            reason = cell["status"] if cell["status"] != FINISHED else f"no {metric}"
            reasons.append(f"cell {cell['cell']} ({reason})")
            left_out[setting] = left_out.get(setting, 0) + 1
        elif seed in values:
            what = f"two cells have the setting {_spelled(axes, setting)} and the seed '{seed}'"
            raise UserError(what, CELLS, "keep one of them, or give them different seeds (run.seed)")
        else:
            values[seed] = value
    seeds = sorted({seed for values in found.values() for seed in values}, key=lambda seed: (len(seed), seed))
    rows = [_row(axes, setting, found, chosen, seeds, left_out.get(setting, 0)) for setting in found]
    return SweepSummary(
        pd.DataFrame(rows), axes, metric, _spelled(list(chosen), tuple(chosen.values())), reasons, len(cells)
    )


def axes_of(cells: pd.DataFrame) -> list[str]:
    """Return what was varied: the variant, and dotted settings that differ, but not those that a variant decides."""
    dotted = [name for name in cells.columns if "." in name and name != SEED and cells[name].nunique() > 1]
    if VARIANT not in cells or cells[VARIANT].nunique() == 1:
        return dotted
    return [VARIANT] + [name for name in dotted if cells.groupby(VARIANT)[name].nunique().max() > 1]


def _row(
    axes: list[str],
    setting: Setting,
    found: dict[Setting, dict[str, float]],
    baseline: dict[str, str],
    seeds: list[str],
    left_out: int,
) -> dict[str, object]:
    values = found[setting]
    mean, std = mean_and_std(list(values.values()))
    partner = tuple(baseline.get(axis, own) for axis, own in zip(axes, setting, strict=True))
    row: dict[str, object] = {"setting": label(axes, setting), **dict(zip(axes, setting, strict=True))}
    row |= {"n": len(values), "left_out": left_out, "mean": mean, "std": std}
    if partner == setting or partner not in found:
        row |= {"difference": math.nan, "low": math.nan, "high": math.nan, "pairs": 0}
    else:
        apart = paired(found[partner], values)
        row |= {"difference": apart.mean, "low": apart.low, "high": apart.high, "pairs": apart.pairs}
    return row | {f"seed {seed}".strip(): values.get(seed, math.nan) for seed in seeds}


def label(axes: list[str], setting: Setting) -> str:
    """Return a setting in a few words: the values, with the last part of their keys where there are several."""
    if len(axes) < 2:
        return setting[0] if setting else "all"
    parts = [f"{axis.rpartition('.')[2]} {value or '-'}" for axis, value in zip(axes, setting, strict=True)]
    return ", ".join(part.removeprefix(f"{VARIANT} ") for part in parts)


def _metric(cells: pd.DataFrame, metric: str | None) -> str:
    numbers = [
        name
        for name in cells.columns
        if "." not in name and name not in ("cell", VARIANT, "status") and cells[name].map(_number).notna().any()
    ]
    wanted = metric or next((name for name in METRICS if name in numbers), None)
    if wanted is None and not numbers:
        raise UserError("no cell has numbers yet", CELLS, "go on with pdvit train --config, and plot it then")
    if wanted is None:
        raise UserError("the cells have no accuracy and no miou", CELLS, f"name a --metric: {', '.join(numbers)}")
    if wanted not in numbers:
        raise UserError(f"the cells have no numbers '{wanted}'", "--metric", closest(wanted, numbers))
    return wanted


def _baseline(cells: pd.DataFrame, axes: list[str], wanted: str | None) -> dict[str, str]:
    """Return the values that the baseline has, by axis."""
    if wanted is None:
        return {axes[0]: str(cells[axes[0]].iloc[0])} if axes else {}
    chosen = {}
    for part in wanted.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals:
            key, value = (axes or [VARIANT])[0], part.strip()
        if key not in axes:
            raise UserError(f"'{key}' was not varied in this sweep", "--baseline", closest(key, axes))
        there = [str(found) for found in cells[key].unique()]
        alike = [found for found in there if found == value or None is not _number(found) == _number(value)]
        if not alike:
            raise UserError(f"no cell has {key}={value}", "--baseline", closest(value, there))
        chosen[key] = alike[0]
    return chosen


def _spelled(axes: list[str], setting: Setting) -> str:
    return ",".join(f"{axis}={value}" for axis, value in zip(axes, setting, strict=True))


def _number(text: object) -> float | None:
    """Return a finite number, or None where there is none."""
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
