"""What is taken for what: the confusion matrix, and its largest entries off the diagonal."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from pdvit.errors import UserError
from pdvit.plots.style import short, styled

# Classes up to which cells carry their number, and every class its name; and the most that are drawn at all.
NUMBERED, NAMED, DRAWN = 15, 50, 200
# Confusions that are listed beside a matrix whose cells carry no numbers.
LISTED = 15
# Names on an axis of more classes than can all be named.
TICKS = 20


def read_confusion(run: Path) -> pd.DataFrame:
    """Read confusion.csv as a matrix of images, by class (rows) and predicted class (columns) in their own order.

    Raises UserError where it is damaged.
    """
    file = run / "confusion.csv"
    try:
        # a class may be called "NA" or "1", which pandas would take for no value and for a number
        with file.open(encoding="utf-8", errors="replace", newline="") as opened:
            rows = list(csv.DictReader(opened, strict=True))
        counts = {(row["class"], row["predicted"]): int(row["images"]) for row in rows}
        classes = list(dict.fromkeys(row["class"] for row in rows))
        if not classes or min(counts.values()) < 0 or len(counts) != len(rows):
            raise ValueError("it holds no images by class")
        number = {name: index for index, name in enumerate(classes)}
        matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
        for (name, predicted), images in counts.items():
            matrix[number[name], number[predicted]] = images
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        what = "the confusion matrix is damaged, or not one of pdvit eval"
        raise UserError(what, str(file), f"measure it again: pdvit eval {run}") from error
    return pd.DataFrame(matrix, index=classes, columns=classes)


def plot_confusion(matrix: pd.DataFrame, name: str) -> Figure:
    """Draw the shares of each class's images by what they were taken for; of many classes, those with most errors.

    Args:
        matrix: as `read_confusion` returns it.
        name: of the checkpoint, for the title.
    """
    images, right = int(matrix.to_numpy().sum()), int(np.trace(matrix))
    shown = _worst(matrix)
    count = len(shown)
    side = min(7.0, max(3.6, 0.36 * count + 1.4)) if count <= NUMBERED else 7.0
    listed = count > NUMBERED
    with styled(
        side + 1.0 + 4.0 * listed, side, columns=1 + listed, width_ratios=(side + 1, 4.0)[: 1 + listed]
    ) as figure:
        _draw_matrix(figure.axes[0], shown)
        of = f"\nthe {count} classes with most errors, of {len(matrix):,}" if count < len(matrix) else ""
        share = f"{right / images:.1%}" if images else "none"
        figure.axes[0].set_title(f"{short(name)}: {share} of {images:,} images told right{of}")
        if listed:
            _draw_list(figure.axes[1], matrix)
        return figure


def _worst(matrix: pd.DataFrame) -> pd.DataFrame:
    """Return the classes that are drawn, in their own order: all, or of many those with most errors."""
    if len(matrix) <= DRAWN:
        return matrix
    counts = matrix.to_numpy()
    errors = counts.sum(1) - counts.diagonal()
    kept = np.sort(np.argsort(-errors, kind="stable")[:DRAWN])
    return matrix.iloc[kept, kept]


def _draw_matrix(axes: Any, matrix: pd.DataFrame) -> None:
    """Draw shares of rows, from white to dark; the square root keeps rare confusions visible."""
    counts, count = matrix.to_numpy(), len(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if count <= NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    step = 1 if count <= NAMED else -(-count // TICKS)
    ticks = range(0, count, step)
    names = [short(str(matrix.index[tick])) for tick in ticks]
    small = 9 if count <= NUMBERED else 6.5 if step == 1 else 7.5
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=small)
    axes.set_yticks(ticks, names, fontsize=small)
    axes.set(xlabel="predicted", ylabel="class")
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class's images")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"])


def _draw_list(axes: Any, matrix: pd.DataFrame) -> None:
    """Draw the largest entries off the diagonal as bars, the largest on top."""
    wrong = matrix.to_numpy().copy()
    np.fill_diagonal(wrong, 0)
    largest = [index for index in np.argsort(-wrong, axis=None, kind="stable")[:LISTED] if wrong.flat[index]]
    pairs = [divmod(int(index), len(wrong)) for index in largest]
    values = [int(wrong[pair]) for pair in pairs]
    names = [f"{short(str(matrix.index[row]))} → {short(str(matrix.index[column]))}" for row, column in pairs]
    axes.barh(range(len(pairs)), values, color="#3f90da", height=0.7)
    axes.set_yticks(range(len(pairs)), names, fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    for place, value in enumerate(values):
        axes.annotate(str(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title("most frequent confusions (class → predicted), images" if pairs else "no confusions")
