"""One look for all figures: colours told apart by the colour-blind, and line styles that survive greyscale."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice, product
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# The petroff10 colours in an order whose greys differ from one to the next.
COLOURS = ("#3f90da", "#bd1f01", "#94a4a2", "#832db6", "#ffa90e", "#a96b59", "#e76300", "#717581")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

RC: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@contextmanager
def styled(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[Figure]:
    """Open a figure of the given size in inches with its axes; the caller closes it."""
    with plt.rc_context(RC):
        figure, _ = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
        yield figure


def looks(count: int) -> list[dict[str, Any]]:
    """Return `count` line looks that differ in colour, dashes and marker."""
    pairs = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    return [{"color": c, "linestyle": d, "marker": m} for c, d, m in islice(pairs, count)]


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Move label heights apart to at least `gap`, keeping their order and their middle."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _, at in product(range(50), range(len(placed) - 1)):
        short = gap - (placed[at + 1] - placed[at])
        if short > 1e-9:
            placed[at] -= short / 2
            placed[at + 1] += short / 2
    result = [0.0] * len(heights)
    for position, index in enumerate(order):
        result[index] = placed[position]
    return result
