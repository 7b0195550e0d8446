"""A sweep by setting: mean and spread over seeds, paired differences from a baseline; as table, Markdown and figure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.special import stdtrit

from pdvit.errors import UserError, closest
from pdvit.plots.reading import read_text_table, reading
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, new_figure, shorten

CELLS, SEED, VARIANT, FINISHED = "cells.csv", "run.seed", "variant", "finished"
METRICS = ("accuracy", "miou")  # compared by default: the first that the cells have
PERCENT = ("accuracy", "accuracy_top5", "miou")  # fractions that are shown in percent
MAX_NAMED = 8  # unfinished cells that a note lists
LEVEL = 0.975  # quantile of Student's t for a two-sided interval of 95 %
ROW, AROUND = 0.26, 0.75  # heights of a setting and of what is around all, in inches
MINUS, NOTHING = "\u2212", "\u2013"
Setting = tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """A difference of means with its 95 % interval (NaN for fewer than two pairs), and the number of pairs."""

    mean: float
    low: float
    high: float
    pairs: int


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (n - 1), NaN of fewer than one and two values."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def interval(values: Sequence[float]) -> Difference:
    """Return the mean of a sample with its t interval; `pairs` is its size."""
    mean, std = mean_and_std(values)
    half = float(stdtrit(len(values) - 1, LEVEL)) * std / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(mean, mean - half, mean + half, len(values))


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Return second minus first over the keys (seeds) of both. Pairing removes the effect of a seed on both."""
    return interval([second[key] - first[key] for key in first if key in second])


@dataclass(frozen=True)
class SweepSummary:
    """A sweep by setting.

    Attributes:
        table: one row per setting: `setting`, a column for each of `axes`, n, left_out, mean, std, difference, low and
            high (95 % confidence), pairs, and the value of each seed (`seed 0`).
        axes: the swept keys: `variant`, or dotted names of settings.
        baseline: as KEY=VALUE; empty if there is only one setting.
        left_out: cells without a number, and why.
        cells: the number of all cells.
    """

    table: pd.DataFrame
    axes: list[str]
    metric: str
    baseline: str
    left_out: list[str]
    cells: int

    @property
    def percent(self) -> bool:
        """Whether the metric is a fraction that is shown in percent."""
        return self.metric in PERCENT

    @property
    def heading(self) -> str:
        """The metric with its unit."""
        return self.metric.replace("_", " ") + (", %" if self.percent else "")

    @property
    def seeds(self) -> list[str]:
        """Columns of the table that hold the values of single seeds."""
        return [column for column in map(str, self.table) if column == "seed" or column.startswith("seed ")]

    def rows(self) -> list[dict[Any, Any]]:
        """Return the rows of the table, with numbers in the unit that is shown."""
        numbers = ["mean", "std", "difference", "low", "high", *self.seeds]
        return self.table.assign(**self.table[numbers] * (100 if self.percent else 1)).to_dict("records")


def read_cells(place: Path) -> pd.DataFrame:
    """Read cells.csv of a sweep's folder, or a file like it, everything as text. Raises UserError."""
    file = place / CELLS if place.is_dir() else place
    with reading(file, "name the folder of a sweep: run directories, and cells.csv with the columns cell and status"):
        table = read_text_table(file)
        if missing := sorted({"cell", "status"} - set(table)):
            raise ValueError(f"it has no column '{missing[0]}'")
    return table


def summarise(cells: pd.DataFrame, metric: str | None = None, baseline: str | None = None) -> SweepSummary:
    """Return mean and spread over seeds for each setting, and paired differences from the baseline.

    Args:
        cells: as `read_cells` returns them.
        metric: a column of numbers; default: accuracy or miou.
        baseline: `KEY=VALUE`, several separated by commas, or a value of the first axis alone. Each setting is compared
            with the setting that has these values and is like it otherwise. Default: the first value of the first axis.

    Raises:
        UserError: there is no such metric or baseline, or two cells have the same setting and seed.
    """
    metric = _metric(cells, metric)
    axes = axes_of(cells)
    base = _baseline(cells, axes, baseline)
    values: dict[Setting, dict[str, float]] = {}
    left_out: list[str] = []
    skipped: Counter[Setting] = Counter()
    for cell in cells.to_dict("records"):
        setting = tuple(str(cell[axis]) for axis in axes)
        own, seed, value = values.setdefault(setting, {}), str(cell.get(SEED, "")), _number(cell[metric])
        if cell["status"] != FINISHED or value is None:
            left_out.append(f"cell {cell['cell']} ({cell['status'] if cell['status'] != FINISHED else f'no {metric}'})")
            skipped[setting] += 1
        elif seed in own:
            what = f"two cells have the setting {_key_values(axes, setting)} and the seed '{seed}'"
            raise UserError(what, CELLS, "keep one of them, or give them different seeds (run.seed)")
        else:
            own[seed] = value
    seeds = sorted({seed for own in values.values() for seed in own}, key=lambda seed: (len(seed), seed))
    rows = []
    for setting, own in values.items():
        mean, std = mean_and_std(list(own.values()))
        partner = tuple(base.get(axis, value) for axis, value in zip(axes, setting, strict=True))
        change = paired({} if partner == setting else values.get(partner, {}), own)
        row: dict[str, object] = {"setting": _label(axes, setting), **dict(zip(axes, setting, strict=True))}
        row |= {"n": len(own), "left_out": skipped[setting], "mean": mean, "std": std}
        row |= {"difference": change.mean, "low": change.low, "high": change.high, "pairs": change.pairs}
        rows.append(row | {f"seed {seed}".strip(): own.get(seed, math.nan) for seed in seeds})
    name = _key_values(list(base), tuple(base.values()))
    return SweepSummary(pd.DataFrame(rows), axes, metric, name, left_out, len(cells))


def axes_of(cells: pd.DataFrame) -> list[str]:
    """Return the swept keys: the variant, and dotted settings that differ within a variant."""
    dotted = [name for name in cells.columns if "." in name and name != SEED and cells[name].nunique() > 1]
    if VARIANT not in cells or cells[VARIANT].nunique() == 1:
        return dotted
    return [VARIANT] + [name for name in dotted if cells.groupby(VARIANT)[name].nunique().max() > 1]


def _label(axes: list[str], setting: Setting) -> str:
    """Return the values of a setting, with the last part of their keys if there are several."""
    if len(axes) < 2:
        return setting[0] if setting else "all"
    parts = [f"{axis.rpartition('.')[2]} {value or '-'}" for axis, value in zip(axes, setting, strict=True)]
    return ", ".join(part.removeprefix(f"{VARIANT} ") for part in parts)


def _key_values(axes: list[str], setting: Setting) -> str:
    return ",".join(f"{axis}={value}" for axis, value in zip(axes, setting, strict=True))


def _metric(cells: pd.DataFrame, metric: str | None) -> str:
    columns = [name for name in cells.columns if "." not in name and name not in ("cell", VARIANT, "status")]
    numbers = [name for name in columns if cells[name].map(_number).notna().any()]
    if metric is not None and metric not in numbers:
        raise UserError(f"the cells have no numbers '{metric}'", "--metric", closest(metric, numbers))
    found = metric or next((name for name in METRICS if name in numbers), None)
    if found is None:
        tip = f"name a --metric: {', '.join(numbers)}" if numbers else "resume with pdvit train --config, then plot"
        raise UserError("the cells have no accuracy and no miou" if numbers else "no cell has numbers yet", CELLS, tip)
    return found


def _baseline(cells: pd.DataFrame, axes: list[str], baseline: str | None) -> dict[str, str]:
    """Return the values of the baseline, by axis."""
    if baseline is None:
        return {axes[0]: str(cells[axes[0]].iloc[0])} if axes else {}
    values = {}
    for part in baseline.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals:
            key, value = (axes or [VARIANT])[0], part.strip()
        if key not in axes:
            raise UserError(f"'{key}' was not varied in this sweep", "--baseline", closest(key, axes))
        known = [str(known) for known in cells[key].unique()]
        equal = [text for text in known if text == value or None is not _number(text) == _number(value)]
        if not equal:
            raise UserError(f"no cell has {key}={value}", "--baseline", closest(value, known))
        values[key] = equal[0]
    return values


def _number(text: object) -> float | None:
    """Return a finite number, or None."""
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def table_of(sweep: SweepSummary) -> list[list[str]]:
    """Return the table as text, headings first: the swept keys, n, mean ± std, difference with its interval."""
    largest = sweep.table["mean"].abs().max() * (100 if sweep.percent else 1)
    digits = 1 if largest >= 10 else 2 if largest >= 1 else 3
    unit = "difference, points" if sweep.percent else "difference"
    lines = [[*(sweep.axes or ["setting"]), "n", sweep.heading, f"{unit} [95 %]"]]
    for row in sweep.rows():
        value = NOTHING if math.isnan(row["mean"]) else f"{row['mean']:.{digits}f}"
        value += "" if math.isnan(row["std"]) else f" ± {row['std']:.{digits}f}"
        change, low, high = (f"{row[key]:+.{digits}f}".replace("-", MINUS) for key in ("difference", "low", "high"))
        change += "" if math.isnan(row["low"]) else f" [{low}, {high}]"
        change += f" ({row['pairs']} pairs)" if row["pairs"] < row["n"] else ""
        settings = [str(row[axis]) or NOTHING for axis in sweep.axes] or [row["setting"]]
        lines.append([*settings, str(row["n"]), value, NOTHING if math.isnan(row["difference"]) else change])
    return lines


def notes_of(sweep: SweepSummary) -> list[str]:
    """Return how the numbers were computed, and the cells that are not in them."""
    notes = ["mean ± standard deviation (n - 1) over seeds"]
    if sweep.baseline:
        text = f"difference from the setting with {sweep.baseline} that is alike otherwise, paired by seed, with its "
        notes.append(text + "95 % confidence interval (Student's t)")
    if count := len(sweep.left_out):
        more = f" and {count - MAX_NAMED} more" if count > MAX_NAMED else ""
        named = ", ".join(sweep.left_out[:MAX_NAMED])
        notes.append(f"{count} of {sweep.cells} cells are not in these numbers: {named}{more}")
    return notes


def markdown(sweep: SweepSummary) -> str:
    """Return the table and its notes for a Markdown page."""

    def escape(text: str) -> str:
        return " ".join("".join(f"\\{sign}" if sign in "\\`*_<>|[]" else sign for sign in text).split())

    head, *body = ([escape(cell) for cell in row] for row in table_of(sweep))
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
    return "\n".join([*lines, "", *(f"- {escape(note)}" for note in notes_of(sweep))]) + "\n"


def plot_sweep(sweep: SweepSummary, name: str, theme: Theme = LIGHT) -> Drawing:
    """Draw each setting's seeds as dots and their mean with one standard deviation; beside it, paired differences."""
    table, rows = sweep.table, sweep.rows()
    hues = list((table[sweep.axes[0]] if sweep.axes else table["setting"]).unique())  # one colour for each value
    with new_figure(DOUBLE, ROW * len(table) + AROUND, theme) as figure:
        figure.data = table
        left, *_ = figure.subplots(1, 1 + bool(sweep.baseline), squeeze=False, sharey=True)[0]
        left.set(title=shorten(name), xlabel=f"{sweep.heading}: mean ± std, dots are seeds")
        for axes in figure.axes[1:]:
            axes.axvline(0, color=theme.muted, linewidth=0.8)
            unit = ", points" if sweep.percent else ""
            label = f"minus {shorten(sweep.baseline, 34)}{unit}"
            axes.set(title="paired difference, 95 % confidence", xlabel=label)
        for place, row in enumerate(rows):
            colour = theme.colours[hues.index(row[(sweep.axes or ["setting"])[0]]) % len(theme.colours)]
            seeds = [row[column] for column in sweep.seeds]
            left.plot(seeds, [place + 0.16] * len(seeds), "o", color=colour, alpha=0.5, markersize=3, markeredgewidth=0)
            _mark(left, row["mean"], place, colour, (row["std"], row["std"]))
            for axes in figure.axes[1:]:
                change = row["difference"]
                _mark(axes, change, place, colour, (change - row["low"], row["high"] - change))
        counts = table["n"].nunique() > 1
        labels = [shorten(row["setting"], 40) + (f" (n = {row['n']})" if counts else "") for row in rows]
        left.set_yticks(range(len(table)), labels)
        left.set_ylim(len(table) - 0.4, -0.6)
        for axes in figure.axes:
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.tick_params(axis="y", length=0)
        return figure


def _mark(axes: Axes, value: float, place: int, colour: str, reach: tuple[float, float]) -> None:
    """Draw a mean with the known ends of its interval."""
    if math.isfinite(value):
        ends = [[0.0 if math.isnan(end) else end] for end in reach]
        axes.errorbar(
            [value], [place - 0.1], xerr=ends, fmt="D", color=colour, markersize=4, capsize=2.2, elinewidth=1.2
        )
