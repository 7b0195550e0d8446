"""What is taken for what: the confusion matrix, and its largest entries off the diagonal."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm

from pdvit.errors import UserError
from pdvit.plots.style import LIGHT, Drawing, Theme, new_figure, shorten

# Classes up to which cells carry their number, and every class its name; and the most that are drawn at all.
NUMBERED, NAMED, DRAWN = 15, 50, 200
# Confusions that are listed beside a matrix whose cells carry no numbers.
LISTED = 15
# Names on an axis of more classes than can all be named.
TICKS = 20


def read_confusion(run: Path) -> pd.DataFrame:
    """Read confusion.csv: class, predicted and images; UserError where it is damaged."""
    file = run / "confusion.csv"
    try:
        # a class may be called "NA" or "1", which pandas would take for no value and for a number
        with file.open(encoding="utf-8", errors="replace", newline="") as opened:
            rows = list(csv.DictReader(opened, strict=True))
        names = ("class", "predicted")
        table = pd.DataFrame({name: [row[name] for row in rows] for name in names}, dtype=object)
        table["images"] = [int(row["images"]) for row in rows]
        unknown = set(table["predicted"]) - set(table["class"])
        if table.empty or table["images"].min() < 0 or table.duplicated(names).any() or unknown:
            raise ValueError("it is not a matrix of images by class")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        what = "the confusion matrix is damaged, or not one of pdvit eval"
        raise UserError(what, str(file), f"measure it again: pdvit eval {run}") from error
    return table


def plot_confusion(table: pd.DataFrame, name: str, theme: Theme = LIGHT) -> Drawing:
    """Draw the shares of each class's images by what they were taken for; of many classes, those with most errors.

    Args:
        table: as `read_confusion` returns it.
        name: of the checkpoint, for the title.
        theme: colours.
    """
    wrong = table[table["class"] != table["predicted"]]
    images, classes = int(table["images"].sum()), list(table["class"].unique())
    shown = _worst(classes, wrong)
    count, listed = len(shown), len(shown) > NUMBERED
    names = 0.07 * max(len(shorten(label)) for label in shown)  # what they take of the figure, in inches
    side = 7.0 if listed else max(3.2, 0.36 * count) + names
    size = (side + 1.2 + 4.0, side) if listed else (side + 1.2, side)
    with new_figure(*size, theme, columns=1 + listed, width_ratios=(side + 1.2, 4.0)[: 1 + listed]) as figure:
        figure.data = _drawn(table, name, shown, listed)
        _draw_matrix(figure.axes[0], table, shown, theme)
        of = f"\nthe {count} classes with most errors, of {len(classes):,}" if count < len(classes) else ""
        right = f"{1 - wrong['images'].sum() / max(images, 1):.1%}".replace("%", " %")
        figure.axes[0].set_title(f"{shorten(name)}\n{right} of {images:,} images told right{of}")
        if listed:
            _draw_list(figure.axes[1], wrong, theme)
        return figure


def _worst(classes: list[str], wrong: pd.DataFrame) -> list[str]:
    """Return the classes that are drawn, in their own order: all, or of many those with most errors."""
    if len(classes) <= DRAWN:
        return classes
    errors = wrong.groupby("class")["images"].sum().reindex(classes, fill_value=0)
    kept = set(errors.sort_values(ascending=False, kind="stable").index[:DRAWN])
    return [name for name in classes if name in kept]


def _drawn(table: pd.DataFrame, name: str, shown: list[str], listed: bool) -> pd.DataFrame:
    """Return the pairs that are cells or bars, with the share of the class's images."""
    of_class = table.groupby("class")["images"].transform("sum").clip(lower=1)
    rows = table.assign(run=name, share=table["images"] / of_class)[["run", *table.columns, "share"]]
    inside = rows["class"].isin(shown) & rows["predicted"].isin(shown)
    largest = rows.index.isin(_largest(table[table["class"] != table["predicted"]]).index)
    return rows[inside | (largest & listed)]


def _largest(wrong: pd.DataFrame) -> pd.DataFrame:
    """Return the most frequent confusions, the largest first."""
    return wrong[wrong["images"] > 0].sort_values("images", ascending=False, kind="stable").head(LISTED)


def _draw_matrix(axes: Axes, table: pd.DataFrame, shown: list[str], theme: Theme) -> None:
    """Draw shares of rows, from the paper to the ink; the square root keeps rare confusions visible."""
    count, place = len(shown), {name: index for index, name in enumerate(shown)}
    of_class = table.groupby("class")["images"].sum()
    counts = np.zeros((count, count), dtype=np.int64)
    inside = table[table["class"].isin(place) & table["predicted"].isin(place)]
    counts[inside["class"].map(place).astype(int), inside["predicted"].map(place).astype(int)] = inside["images"]
    shares = counts / np.maximum(of_class[shown].to_numpy(), 1)[:, None]
    scale, colours = PowerNorm(0.5, 0, 1), (theme.paper, theme.colours[0], theme.ink)
    shades = LinearSegmentedColormap.from_list("shares", colours)
    image = axes.imshow(shares, cmap=shades, norm=scale, interpolation="nearest")
    if count <= NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = theme.paper if scale(shares[row, column]) > 0.5 else theme.ink
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    step = 1 if count <= NAMED else -(-count // TICKS)
    ticks = range(0, count, step)
    names = [shorten(shown[tick]) for tick in ticks]
    small = 9 if count <= NUMBERED else 6.5 if step == 1 else 7.5
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=small)
    axes.set_yticks(ticks, names, fontsize=small)
    axes.set(xlabel="predicted", ylabel="class")
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class's images")
    bar.set_ticks([0, 0.01, 0.05, 0.25, 1], labels=["0", "1 %", "5 %", "25 %", "100 %"])


def _draw_list(axes: Axes, wrong: pd.DataFrame, theme: Theme) -> None:
    """Draw the largest entries off the diagonal as bars, the largest on top."""
    largest = _largest(wrong)
    pairs, values = zip(largest["class"], largest["predicted"], strict=True), largest["images"].tolist()
    names = [f"{shorten(name)} → {shorten(predicted)}" for name, predicted in pairs]
    axes.barh(range(len(names)), values, color=theme.colours[0], height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    for place, value in enumerate(values):
        axes.annotate(str(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title("most frequent confusions, images" if names else "no confusions")
