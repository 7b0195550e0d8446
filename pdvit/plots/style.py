"""One look for all figures: colours told apart by the colour-blind, and line styles that survive greyscale."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# The petroff10 colours in an order whose greys differ from one to the next.
COLOURS = ("#3f90da", "#bd1f01", "#94a4a2", "#832db6", "#ffa90e", "#a96b59", "#e76300", "#717581")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Letters of a name before its middle is left out.
NAME = 28

RC: dict[Any, Any] = {
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
    "text.parse_math": False,  # names of runs are drawn as they are
}


@contextmanager
def styled(
    width: float, height: float, rows: int = 1, columns: int = 1, width_ratios: Sequence[float] | None = None
) -> Iterator[Figure]:
    """Make a figure of the given size in inches with its axes, to draw on inside."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios)
        yield figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the suffix. Raises OSError."""
    _render(figure, path, path.suffix[1:].lower())


def _render(figure: Figure, target: Any, form: str) -> None:
    with mpl.rc_context(RC), warnings.catch_warnings():
        # names may be in any script: letters that the font lacks become boxes (in SVG they stay text)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format=form)


def to_svg(figure: Figure) -> str:
    """Return a figure as the text of an SVG file."""
    text = StringIO()
    _render(figure, text, "svg")
    return text.getvalue()


def looks(count: int) -> list[dict[str, Any]]:
    """Return `count` line looks that differ in colour, dashes and marker."""
    pairs = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    return [{"color": c, "linestyle": d, "marker": m} for c, d, m in islice(pairs, count)]


def short(name: str) -> str:
    """Return a name that fits beside a line: a long one without its middle."""
    return name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}…{name[-(NAME // 2) :]}"


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Move label heights apart to at least `gap`, keeping their order and their middle."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _, at in product(range(50), range(len(placed) - 1)):
        apart = gap - (placed[at + 1] - placed[at])
        if apart > 1e-9:
            placed[at] -= apart / 2
            placed[at + 1] += apart / 2
    result = [0.0] * len(heights)
    for position, index in enumerate(order):
        result[index] = placed[position]
    return result
