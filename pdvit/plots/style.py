"""The style of all figures, light and dark: lines differ for colour-blind readers and in greyscale."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

SINGLE, DOUBLE = 3.5, 7.2  # widths of one and two columns of a paper, in inches; text has 7 to 9 points at that size
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LEGEND_COLUMNS, PANEL_COLUMNS = 4, 3
TITLE_PLACES: tuple[Literal["left", "center", "right"], ...] = ("left", "center", "right")
# Without dates, the same figure gives the same file.
METADATA: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


@dataclass(frozen=True)
class Theme:
    """Colours of lines (neighbours differ in greyscale), paper, text and guides; `ramp` is a range of viridis.

    `diverging` is a colour map for numbers of both signs, with the paper in the middle.
    """

    colours: tuple[str, ...]
    paper: str
    ink: str
    muted: str
    ramp: tuple[float, float]
    diverging: str


# petroff10, reordered; the dark theme has the same hues, lighter.
LIGHT = Theme(
    ("#3f90da", "#bd1f01", "#ffa90e", "#832db6", "#94a4a2", "#a96b59", "#e76300", "#717581"),
    *("#ffffff", "#1a1a1a", "#767676"),
    *((0.0, 0.85), "RdBu_r"),
)
DARK = Theme(
    ("#5aa9f0", "#ff6a4d", "#ffbe4a", "#a855e8", "#b4c4c2", "#c98d7b", "#e88b20", "#9197a4"),
    *("#16191d", "#e8e8e8", "#8f959c"),
    *((0.25, 1.0), "berlin"),
)

RC: dict[Any, Any] = dict(
    mpl.rc_params_from_file(Path(__file__).with_name("pdvit.mplstyle"), use_default_template=False)
)


class Drawing(Figure):
    """A figure with its numbers as a tidy table."""

    data: pd.DataFrame


@contextmanager
def new_figure(data: pd.DataFrame, width: float, height: float, theme: Theme = LIGHT) -> Iterator[Drawing]:
    """Open a figure with its numbers, of a size in inches, to draw on inside the context."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    colours = dict.fromkeys(inked, theme.ink) | dict.fromkeys(paper, theme.paper) | {"grid.color": theme.muted}
    with mpl.rc_context(RC | colours):
        figure = Drawing(figsize=(width, height), layout="constrained")
        figure.data = data
        yield figure


@contextmanager
def run_panels(
    data: pd.DataFrame, height: float, theme: Theme = LIGHT, **options: Any
) -> Iterator[tuple[Drawing, list[tuple[Axes, pd.DataFrame]]]]:
    """Open a figure with a panel for each `run` of the data, in rows of three of a height, and yield panels with rows.

    `options` go to `subplots`.
    """
    runs = list(data.groupby("run", sort=False))
    columns = min(PANEL_COLUMNS, len(runs))
    lines = -(-len(runs) // columns)
    with new_figure(data, SINGLE if columns == 1 else DOUBLE, lines * height, theme) as figure:
        panels = list(figure.subplots(lines, columns, squeeze=False, **options).ravel())
        for axes in panels[len(runs) :]:
            axes.remove()
        for axes, (name, _) in zip(panels, runs, strict=False):
            axes.set_title(shorten(str(name), 40), fontsize=7.5)
        yield figure, [(axes, rows) for axes, (_, rows) in zip(panels, runs, strict=False)]


def render(figure: Figure, suffix: str) -> bytes:
    """Return a figure as a file of the format of a suffix (`.svg`), each time the same bytes."""
    suffix, packed = suffix.lower(), BytesIO()
    with mpl.rc_context(RC), warnings.catch_warnings():
        # letters that the font lacks become boxes (in SVG they stay text)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(packed, format=suffix[1:], facecolor=figure.get_facecolor(), metadata=METADATA.get(suffix))
    return packed.getvalue()


def line_styles(count: int, theme: Theme = LIGHT) -> list[dict[str, Any]]:
    """Return styles that differ in colour, dashes and marker; the first 28 also without their colours."""
    cycles = {"color": theme.colours, "linestyle": DASHES, "marker": MARKERS}
    return [{name: values[at % len(values)] for name, values in cycles.items()} for at in range(count)]


def depth_colours(theme: Theme, deepest: int) -> ScalarMappable:
    """Return a colour map of depths from 0 to the deepest, monotone in greyscale."""
    colours = colormaps["viridis"](np.linspace(*theme.ramp, 64))
    return ScalarMappable(Normalize(0, max(1, deepest)), ListedColormap(colours))


def shorten(name: str, length: int = 28) -> str:
    """Return a name of at most `length` printable letters; a long one loses its middle."""
    name = "".join(letter if letter.isprintable() else "·" for letter in re.sub(r"\s", " ", name))
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"


def remove_title(figure: Figure) -> None:
    """Remove the title of a figure, or of its only panel; titles that tell panels apart stay."""
    titled = [axes for axes in figure.axes if any(axes.get_title(place) for place in TITLE_PLACES)]
    if figure.get_suptitle():
        figure.suptitle("")
    elif len(titled) == 1:
        for place in TITLE_PLACES:
            titled[0].set_title("", loc=place)


def unique(names: Sequence[str]) -> list[str]:
    """Return names that differ: repeated ones get a number."""
    return [f"{name} ({names[:at].count(name) + 1})" if name in names[:at] else name for at, name in enumerate(names)]


def name_ticks(axis: Axis, names: Mapping[Any, str], ticks: int, **text: Any) -> None:
    """Name about `ticks` of the positions of an axis, evenly spaced, always with the last."""
    positions = list(names)
    last, step = len(positions) - 1, max(1, -(-len(positions) // ticks))
    shown = [positions[at] for at in range(last) if at % step == 0 and last - at >= step] + positions[last:]
    axis.set_ticks(shown, [shorten(names[at]) for at in shown], **text)


def name_layers(axis: Axis, layers: Iterable[str], ticks: int, **text: Any) -> None:
    """Name about `ticks` layers, from position 0; blocks have their number."""
    name_ticks(axis, {at: layer.removeprefix("block ") for at, layer in enumerate(layers)}, ticks, **text)


def legend(figure: Figure, styles: dict[str, dict[str, Any]], more: Sequence[Line2D] = ()) -> None:
    """Name the runs once, above all panels."""
    lines = [Line2D([], [], label=shorten(name), **style) for name, style in styles.items()] + list(more)
    columns = min(LEGEND_COLUMNS, len(lines))
    figure.legend(handles=lines, loc="outside upper left", ncols=columns, borderaxespad=0.2, columnspacing=1.4)
