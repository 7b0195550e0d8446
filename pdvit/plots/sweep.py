"""A sweep by setting: mean and spread over seeds, paired differences from a baseline; as table, Markdown and figure."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy.special import stdtrit

from pdvit.errors import UserError, closest
from pdvit.files import reading
from pdvit.plots.reading import read_text_table
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, new_figure, shorten

CELLS, SEED, VARIANT, FINISHED = "cells.csv", "run.seed", "variant", "finished"
METRICS = ("accuracy", "miou")  # compared by default: the first that the cells have
PERCENT = ("accuracy", "accuracy_top5", "miou")  # fractions that are shown in percent
MAX_NAMED = 8  # unfinished cells that a note lists
LEVEL = 0.975  # quantile of Student's t for a two-sided interval of 95 %
ROW, AROUND = 0.26, 0.75  # heights of a setting and of what is around all, in inches
MINUS, NOTHING = "\u2212", "\u2013"
Setting = tuple[str, ...]


class Estimate(NamedTuple):
    """Mean, standard deviation (n - 1) and 95 % interval (Student's t) of a sample; NaN if it has too few values."""

    n: int
    mean: float
    std: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the estimate of a sample."""
    sample = pd.Series(values, dtype=float)
    mean, half = float(sample.mean()), float(stdtrit(len(sample) - 1, LEVEL) * sample.sem())
    return Estimate(len(sample), mean, float(sample.std()), mean - half, mean + half)


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate:
    """Estimate second minus first over the keys (seeds) of both. Pairing removes the effect of a seed on both."""
    return estimate([second[key] - first[key] for key in first if key in second])


@dataclass(frozen=True)
class SweepSummary:
    """A sweep by setting."""

    # One row per setting: `setting`, a column for each of `axes`, n, left_out, mean, std, difference, low and high
    # (95 % confidence), pairs, and the value of each seed.
    table: pd.DataFrame
    axes: list[str]  # the swept keys: `variant`, or dotted names of settings
    seeds: list[str]  # columns of single seeds: `seed 0`
    metric: str
    baseline: str  # as KEY=VALUE; empty if there is only one setting
    notes: list[str]  # how the numbers were computed, and the cells that are not in them

    @property
    def percent(self) -> bool:
        """Whether the metric is a fraction that is shown in percent."""
        return self.metric in PERCENT

    @property
    def heading(self) -> str:
        """The metric with its unit."""
        return self.metric.replace("_", " ") + (", %" if self.percent else "")

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

    `baseline` is KEY=VALUE, several separated by commas, or a value of the first axis alone; by default the first value
    of the first axis. Each setting is compared with the one that has these values and is like it otherwise. Raises
    UserError, also if two cells have the same setting and seed.
    """
    metric = _metric(cells, metric)
    axes = axes_of(cells)
    base = _baseline(cells, axes, baseline)
    values: dict[Setting, dict[str, float]] = {}  # by seed
    left_out, counts = list[str](), Counter[Setting]()
    for cell in cells.to_dict("records"):
        setting = tuple(cell[axis] for axis in axes)
        own, seed, value = values.setdefault(setting, {}), f"seed {cell.get(SEED, '')}".strip(), _number(cell[metric])
        counts[setting] += 1
        if cell["status"] != FINISHED or math.isnan(value):
            left_out.append(f"cell {cell['cell']} ({cell['status'] if cell['status'] != FINISHED else f'no {metric}'})")
        elif seed in own:
            what = f"two cells have the setting {_key_values(axes, setting)} and {seed}"
            raise UserError(what, CELLS, "keep one of them, or give them different seeds (run.seed)")
        else:
            own[seed] = value
    seeds = sorted({seed for own in values.values() for seed in own}, key=lambda seed: (len(seed), seed))
    rows = []
    for setting, own in values.items():
        partner = tuple(base.get(axis, value) for axis, value in zip(axes, setting, strict=True))
        mean, change = estimate(list(own.values())), paired({} if partner == setting else values.get(partner, {}), own)
        row: dict[str, object] = {"setting": _label(axes, setting), **dict(zip(axes, setting, strict=True))}
        row |= {"n": mean.n, "left_out": counts[setting] - mean.n, "mean": mean.mean, "std": mean.std}
        row |= {"difference": change.mean, "low": change.low, "high": change.high, "pairs": change.n}
        rows.append(row | {seed: own.get(seed, math.nan) for seed in seeds})
    name = _key_values(base, base.values())
    notes = ["mean ± standard deviation (n - 1) over seeds"]
    if name:
        text = f"difference from the setting with {name} that is alike otherwise, paired by seed, with its "
        notes.append(text + "95 % confidence interval (Student's t)")
    if left_out:
        more = f" and {len(left_out) - MAX_NAMED} more" if len(left_out) > MAX_NAMED else ""
        named = ", ".join(left_out[:MAX_NAMED])
        notes.append(f"{len(left_out)} of {len(cells)} cells are not in these numbers: {named}{more}")
    return SweepSummary(pd.DataFrame(rows), axes, seeds, metric, name, notes)


def axes_of(cells: pd.DataFrame) -> list[str]:
    """Return the swept keys: the variant, and dotted settings that differ within a variant."""
    variants = cells.get(VARIANT, pd.Series("", cells.index))
    dotted = [name for name in cells.columns if "." in name and name != SEED]
    varied = [name for name in dotted if cells[name].groupby(variants).nunique().max() > 1]
    return [VARIANT] * (variants.nunique() > 1) + varied


def _label(axes: list[str], setting: Setting) -> str:
    """Return the values of a setting, with the last part of their keys if there are several."""
    if len(axes) < 2:
        return setting[0] if setting else "all"
    parts = [f"{axis.rpartition('.')[2]} {value or '-'}" for axis, value in zip(axes, setting, strict=True)]
    return ", ".join(part.removeprefix(f"{VARIANT} ") for part in parts)


def _key_values(axes: Iterable[str], setting: Iterable[str]) -> str:
    return ",".join(f"{axis}={value}" for axis, value in zip(axes, setting, strict=True))


def _metric(cells: pd.DataFrame, metric: str | None) -> str:
    columns = [name for name in cells.columns if "." not in name and name not in ("cell", VARIANT, "status")]
    numbers = [name for name in columns if cells[name].map(_number).notna().any()]
    found = metric or next((name for name in METRICS if name in numbers), METRICS[0])
    if found not in numbers:
        tip = closest(found, numbers) if numbers else "resume the sweep, then plot"
        raise UserError(f"the cells have no numbers '{found}'", "--metric", tip)
    return found


def _baseline(cells: pd.DataFrame, axes: list[str], baseline: str | None) -> dict[str, str]:
    if baseline is None:
        return {axis: cells[axis].iloc[0] for axis in axes[:1]}
    values = {}
    for part in baseline.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals:
            key, value = (axes or [VARIANT])[0], key
        if key not in axes:
            raise UserError(f"'{key}' was not varied in this sweep", "--baseline", closest(key, axes))
        known = list(cells[key].unique())
        equal = [text for text in known if text == value or _number(text) == _number(value)]
        if not equal:
            raise UserError(f"no cell has {key}={value}", "--baseline", closest(value, known))
        values[key] = equal[0]
    return values


def _number(text: str) -> float:
    """Return a finite number, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


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


def text_of(sweep: SweepSummary) -> str:
    """Return the table and its notes for a terminal."""
    table = table_of(sweep)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([*lines, *sweep.notes])


def markdown(sweep: SweepSummary) -> str:
    """Return the table and its notes for a Markdown page."""

    def escape(text: str) -> str:
        return " ".join("".join(f"\\{sign}" if sign in "\\`*_<>|[]" else sign for sign in text).split())

    head, *body = ([escape(cell) for cell in row] for row in table_of(sweep))
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
    return "\n".join([*lines, "", *(f"- {escape(note)}" for note in sweep.notes)]) + "\n"


def plot_sweep(sweep: SweepSummary, name: str, theme: Theme = LIGHT) -> Drawing:
    """Draw each setting's seeds as dots and their mean with one standard deviation; beside it, paired differences."""
    table, rows = sweep.table, sweep.rows()
    hue = sweep.axes[0] if sweep.axes else "setting"  # one colour for each value
    hues = list(table[hue].unique())
    with new_figure(table, DOUBLE, ROW * len(table) + AROUND, theme) as figure:
        left, *right = figure.subplots(1, 1 + bool(sweep.baseline), squeeze=False, sharey=True)[0]
        left.set(title=shorten(name), xlabel=f"{sweep.heading}: mean ± std, dots are seeds")
        for axes in right:
            axes.axvline(0, color=theme.muted, linewidth=0.8)
            label = f"minus {shorten(sweep.baseline, 34)}{', points' if sweep.percent else ''}"
            axes.set(title="paired difference, 95 % confidence", xlabel=label)
        for place, row in enumerate(rows):
            colour = theme.colours[hues.index(row[hue]) % len(theme.colours)]
            mark: dict[str, Any] = {"fmt": "D", "color": colour, "markersize": 4, "capsize": 2.2, "elinewidth": 1.2}
            seeds, change = [row[column] for column in sweep.seeds], row["difference"]
            left.plot(seeds, [place + 0.16] * len(seeds), "o", color=colour, alpha=0.5, markersize=3, markeredgewidth=0)
            left.errorbar(row["mean"], place - 0.1, xerr=row["std"], **mark)  # of NaN nothing is drawn
            for axes in right:
                axes.errorbar(change, place - 0.1, xerr=[[change - row["low"]], [row["high"] - change]], **mark)
        counts = table["n"].nunique() > 1
        labels = [shorten(row["setting"], 40) + (f" (n = {row['n']})" if counts else "") for row in rows]
        left.set_yticks(range(len(table)), labels)
        left.set_ylim(len(table) - 0.4, -0.6)
        for axes in figure.axes:
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.tick_params(axis="y", length=0)
        return figure
