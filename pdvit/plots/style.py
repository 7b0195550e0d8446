"""One look for all figures, light and dark: colours told apart by the colour-blind, lines that survive greyscale."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure

# Widths of one and of two columns of a paper, in inches; letters are 7 to 9 points at that size.
SINGLE, DOUBLE = 3.5, 7.2
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Letters of a name before its middle is left out.
NAME = 28
# Date and random ids would make each copy of a figure another file.
METADATA: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


@dataclass(frozen=True)
class Theme:
    """Colours: of lines in an order whose greys differ from one to the next, of letters, of what is beside the point.

    `ramp` is the part of the colour map viridis whose lines stand out from the paper.
    """

    colours: tuple[str, ...]
    paper: str
    ink: str
    muted: str
    ramp: tuple[float, float]


# The petroff10 colours, grey after four others; in the dark theme the same hues, lifted off the background.
LIGHT = Theme(
    ("#3f90da", "#bd1f01", "#ffa90e", "#832db6", "#94a4a2", "#a96b59", "#e76300", "#717581"),
    *("#ffffff", "#1a1a1a", "#767676"),
    (0.0, 0.85),
)
DARK = Theme(
    ("#5aa9f0", "#ff6a4d", "#ffbe4a", "#b877e6", "#b4c4c2", "#c98d7b", "#f08030", "#9197a4"),
    *("#16191d", "#e8e8e8", "#8f959c"),
    (0.25, 1.0),
)

RC: dict[Any, Any] = {
    "savefig.dpi": 250,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "svg.fonttype": "none",
    "svg.hashsalt": "pdvit",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names of runs are drawn as they are
}


class Drawing(Figure):
    """A figure that carries the numbers it shows, as a tidy table."""

    data: pd.DataFrame


def colouring(theme: Theme) -> dict[Any, Any]:
    """Return matplotlib's settings for the colours of a theme."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return dict.fromkeys(inked, theme.ink) | dict.fromkeys(paper, theme.paper) | {"grid.color": theme.muted}


@contextmanager
def styled(
    width: float, height: float, theme: Theme = LIGHT, rows: int = 1, columns: int = 1, **grid: Any
) -> Iterator[Drawing]:
    """Make a figure of the given size in inches with its axes (none where `rows` is 0), to draw on inside.

    `grid` goes to matplotlib's `subplots`.
    """
    with mpl.rc_context(RC | colouring(theme)):
        figure = Drawing(figsize=(width, height), layout="constrained")
        if rows:
            figure.subplots(rows, columns, squeeze=False, **grid)
        yield figure


def render(figure: Figure, suffix: str) -> bytes:
    """Return a figure as a file of the format of a suffix (`.svg`), each time the same bytes."""
    suffix, packed = suffix.lower(), BytesIO()
    with mpl.rc_context(RC), warnings.catch_warnings():
        # names may be in any script: letters that the font lacks become boxes (in SVG they stay text)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(packed, format=suffix[1:], facecolor=figure.get_facecolor(), metadata=METADATA.get(suffix))
    return packed.getvalue()


def looks(count: int, theme: Theme = LIGHT) -> list[dict[str, Any]]:
    """Return `count` line looks that differ in colour, dashes and marker; no two of the first 32 are the same."""
    found = []
    for number in range(count):
        turn, colour = divmod(number, len(theme.colours))
        dashes, marker = DASHES[(number + turn) % len(DASHES)], MARKERS[(number + 3 * turn) % len(MARKERS)]
        found.append({"color": theme.colours[colour], "linestyle": dashes, "marker": marker})
    return found


def readable(colour: str, theme: Theme) -> str:
    """Return a colour for letters: that of a line, a third of the way to the ink."""
    mixed = [(2 * own + ink) / 3 for own, ink in zip(to_rgb(colour), to_rgb(theme.ink), strict=True)]
    return to_hex((mixed[0], mixed[1], mixed[2]))


def depths(theme: Theme, deepest: int) -> ScalarMappable:
    """Return the colours of depths from 0 to the deepest: darker or lighter step by step, also in grey."""
    whole = colormaps["viridis"](np.linspace(*theme.ramp, 64))
    return ScalarMappable(Normalize(0, max(1, deepest)), ListedColormap(whole))


def short(name: str, length: int = NAME) -> str:
    """Return a name that fits beside a line: a long one without its middle, what can't be printed as a dot."""
    name = "".join(letter if letter.isprintable() else "·" for letter in re.sub(r"\s", " ", name))
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
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
