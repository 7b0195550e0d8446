"""A sweep as a table to read and as a figure: dots of seeds, means with spread, differences with intervals."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pdvit.plots.ablation import NAMED, SweepSummary
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, new_figure, shorten, unique

# Height of a setting, and of what is around, in inches.
ROW, AROUND = 0.26, 0.75
MINUS, NOTHING = "\u2212", "\u2013"


def plot_sweep(sweep: SweepSummary, name: str, theme: Theme = LIGHT) -> Drawing:
    """Draw each setting's seeds as dots and their mean with one standard deviation; beside it, paired differences.

    Args:
        sweep: as `summarise` returns it.
        name: of the sweep, for the title.
        theme: colours.
    """
    table, factor = sweep.table, 100 if sweep.percent else 1
    places = range(len(table))
    columns = 2 if sweep.baseline else 1
    with new_figure(DOUBLE, ROW * len(table) + AROUND, theme, columns=columns, sharey=True) as figure:
        figure.data = table
        left = figure.axes[0]
        colours = _colours(sweep, theme)
        for place, colour, row in zip(places, colours, table.to_dict("records"), strict=True):
            seeds = [row[column] * factor for column in seeds_of(table)]
            left.plot(seeds, [place + 0.16] * len(seeds), "o", color=colour, alpha=0.5, markersize=3, markeredgewidth=0)
            if row["n"]:
                _mark(left, row["mean"] * factor, place, colour, (row["std"] * factor,) * 2)
        left.set(title=shorten(name), xlabel=f"{heading(sweep)}: mean ± std, dots are seeds")
        if columns == 2:
            _draw_differences(figure.axes[1], sweep, colours, theme)
        counts = table["n"].nunique() > 1
        labels = [shorten(text, 40) for text in unique(table["setting"].tolist())]
        labels = [f"{text} (n = {n})" if counts else text for text, n in zip(labels, table["n"], strict=True)]
        left.set_yticks(places, labels)
        left.set_ylim(len(table) - 0.4, -0.6)
        for axes in figure.axes:
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.tick_params(axis="y", length=0)
        return figure


def seeds_of(table: pd.DataFrame) -> list[str]:
    """Return the columns that hold the values of single seeds."""
    return [str(column) for column in table.columns if column == "seed" or str(column).startswith("seed ")]


def heading(sweep: SweepSummary) -> str:
    """Return the metric with its unit."""
    return sweep.metric.replace("_", " ") + (", %" if sweep.percent else "")


def rows_of(sweep: SweepSummary) -> list[list[str]]:
    """Return the table in words, headings first: what was varied, n, mean ± std, difference with its interval."""
    factor = 100 if sweep.percent else 1
    digits = _digits(sweep.table["mean"].abs().max() * factor)
    unit = "difference, points" if sweep.percent else "difference"
    found = [[*(sweep.axes or ["setting"]), "n", heading(sweep), f"{unit} [95 %]"]]
    for row in sweep.table.to_dict("records"):
        mean, std = row["mean"] * factor, row["std"] * factor
        value = NOTHING if mean != mean else f"{mean:.{digits}f}"
        value += "" if std != std else f" ± {std:.{digits}f}"
        settings = [str(row[axis]) or NOTHING for axis in sweep.axes] or [row["setting"]]
        found.append([*settings, str(row["n"]), value, _difference(row, sweep, factor, digits)])
    return found


def notes_of(sweep: SweepSummary) -> list[str]:
    """Say how the numbers were made, and which cells are not in them."""
    found = ["mean ± standard deviation (n - 1) over seeds"]
    if sweep.baseline:
        text = f"difference from the setting with {sweep.baseline} that is alike otherwise, paired by seed, with its "
        found.append(text + "95 % confidence interval (Student's t)")
    if sweep.left_out:
        named = ", ".join(sweep.left_out[:NAMED])
        more = f" and {len(sweep.left_out) - NAMED} more" if len(sweep.left_out) > NAMED else ""
        found.append(f"{len(sweep.left_out)} of {sweep.cells} cells are not in these numbers: {named}{more}")
    return found


def markdown(sweep: SweepSummary) -> str:
    """Return the table and its notes for a Markdown page."""
    head, *body = [[_escaped(cell) for cell in row] for row in rows_of(sweep)]
    lines = [head, ["---"] * len(head), *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"- {_escaped(note)}" for note in notes_of(sweep)) + "\n"


def _difference(row: Mapping[Any, Any], sweep: SweepSummary, factor: int, digits: int) -> str:
    low, mean, high = (row[key] * factor for key in ("low", "difference", "high"))
    if mean != mean:
        return NOTHING
    interval = "" if low != low else f" [{_signed(low, digits)}, {_signed(high, digits)}]"
    return f"{_signed(mean, digits)}{interval}" + (f" ({row['pairs']} pairs)" if row["pairs"] < row["n"] else "")


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def _digits(largest: float) -> int:
    return 1 if largest >= 10 else 2 if largest >= 1 else 3


def _escaped(text: str) -> str:
    """Keep names from being read as markup."""
    for sign in "\\`*_<>|[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _colours(sweep: SweepSummary, theme: Theme) -> list[str]:
    """Return a colour for each setting: one for each value of what was varied first."""
    values = sweep.table[sweep.axes[0]] if sweep.axes else sweep.table["setting"]
    order = list(values.unique())
    return [theme.colours[order.index(value) % len(theme.colours)] for value in values]


def _mark(axes: Axes, value: float, place: int, colour: str, reach: tuple[float, float]) -> None:
    """Draw a mean with how far it reaches to both sides; nothing where that is not known."""
    known = [[side if side == side else 0.0] for side in reach]
    axes.errorbar([value], [place - 0.1], xerr=known, fmt="D", color=colour, markersize=4, capsize=2.2, elinewidth=1.2)


def _draw_differences(axes: Axes, sweep: SweepSummary, colours: list[str], theme: Theme) -> None:
    factor = 100 if sweep.percent else 1
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    for place, (colour, row) in enumerate(zip(colours, sweep.table.to_dict("records"), strict=True)):
        low, mean, high = (row[key] * factor for key in ("low", "difference", "high"))
        if mean == mean:
            _mark(axes, mean, place, colour, (mean - low, high - mean))
    unit = ", points" if sweep.percent else ""
    axes.set(title="paired difference, 95 % confidence", xlabel=f"minus {shorten(sweep.baseline, 34)}{unit}")
