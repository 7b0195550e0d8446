"""What figures of lines over depth share: one table of all runs, names of layers, keys and labels."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch

from pdvit.plots.style import LIGHT, MARKERS, Theme, looks, readable, short, spread_out

# Ticks beside one another on an axis as wide as a column.
TICKS = 12
# Entries of a legend beside one another.
KEYS = 4


def unique(names: Sequence[str]) -> list[str]:
    """Return names that differ: a number behind those that came before."""
    return [f"{name} ({names[:at].count(name) + 1})" if name in names[:at] else name for at, name in enumerate(names)]


def stacked(tables: Sequence[pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    """Return tables as one, in which a first column `run` says whose each row is, in the order of depth."""
    parts = []
    for table, name in zip(tables, unique(names), strict=True):
        part = table.drop(columns=["model", "run"], errors="ignore")
        part.insert(0, "run", name)
        parts.append(part.sort_values("depth", kind="stable") if "depth" in part else part)
    return pd.concat(parts, ignore_index=True)


def by_run(rows: pd.DataFrame, metric: str | None = None) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each run, of one metric where it is named, in the order the runs came."""
    chosen = rows if metric is None else rows[rows["metric"] == metric]
    return [(str(name), part) for name, part in chosen.groupby("run", sort=False)]


def by_name(rows: pd.DataFrame, theme: Theme = LIGHT) -> dict[str, dict[str, Any]]:
    """Return the look of every run, the same in all panels."""
    names = [str(name) for name in rows["run"].unique()]
    return dict(zip(names, looks(len(names), theme), strict=True))


def thinned(count: int, ticks: int = TICKS) -> list[int]:
    """Return which of `count` places on an axis are named: evenly spread, the last always."""
    step = max(1, -(-count // ticks))
    return [at for at in range(count - 1) if at % step == 0 and count - 1 - at >= step] + [count - 1]


def name_depths(axes: Axes, rows: pd.DataFrame, ticks: int = TICKS) -> None:
    """Name the depths: embed, blocks by number, norm where all lines end at the same depth."""
    deepest = rows.groupby("run")["depth"].max()
    layers = dict(zip(rows["depth"], rows["layer"].astype(str), strict=True))
    depths = sorted(layers)
    shown = [depths[at] for at in thinned(len(depths), ticks)]
    same = deepest.nunique() == 1
    names = [layers[depth] if same or depth == 0 else f"block {depth}" for depth in shown]
    axes.set_xticks(shown, [name.removeprefix("block ") for name in names])
    axes.set_xlabel("block" if same else "depth")


def limit(axes: Axes, low: float | None, high: float | None) -> None:
    """Let an axis begin and end where the metric does, and leave room where it has no end."""
    bottom, top = axes.dataLim.y0, axes.dataLim.y1
    bottom = bottom if low is None else min(low, bottom)
    top = top if high is None else max(high, top)
    room = 0.06 * ((top - bottom) or 1)
    axes.set_ylim(bottom - (room if low is None else 0), top + room)


def stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one run with which a stage begins: fewer patches, or more, than in the layer before."""
    begun: pd.Series[bool] = rows["tokens"].ne(rows["tokens"].shift()) & (rows.index != rows.index[0])
    return rows.loc[begun]


def label_ends(
    axes: Axes, ends: Sequence[tuple[str, float, float, str]], gap: float, lowest: float, theme: Theme
) -> None:
    """Write names right of the lines' ends, apart by `gap`; thin leaders where a name stands elsewhere.

    Args:
        axes: they belong to these, whose limits are set.
        ends: name, x, y and colour of each line's end.
        gap: the least distance, on the scale of y.
        lowest: no name stands below this.
        theme: colours; those of letters are drawn to the ink, to be read.
    """
    heights = spread_out([max(y, lowest) for _, _, y, _ in ends], gap)
    lift = max(0.0, lowest - min(heights))
    left, right = axes.get_xlim()
    room, last = right - left, max(x for _, x, _, _ in ends)
    for (name, x, y, colour), height in zip(ends, heights, strict=True):
        place = (right + 0.03 * room, height + lift)
        shade = readable(colour, theme)
        axes.annotate(short(name), (x, y), place, color=shade, va="center", annotation_clip=False, fontsize=7.5)
        if abs(height + lift - y) > gap / 4 or x < last:
            start, stop = (x + 0.008 * room, y), (right + 0.025 * room, height + lift)
            leader = ConnectionPatch(
                start, stop, "data", axesA=axes, axesB=axes, color=colour, linewidth=0.6, linestyle=":"
            )
            leader.set_annotation_clip(False)  # it reaches out of the axes
            leader.set_clip_on(False)
            leader.set_in_layout(False)
            axes.add_artist(leader)


def legend(figure: Figure, looks: dict[str, dict[str, Any]], more: Sequence[Line2D] = ()) -> None:
    """Name the runs once, above all panels; where they are many, in several rows."""
    lines = [Line2D([], [], label=short(name), **look) for name, look in looks.items()] + list(more)
    columns = min(KEYS, len(lines))
    figure.legend(handles=lines, loc="outside upper left", ncols=columns, borderaxespad=0.2, columnspacing=1.4)


def ring(theme: Theme, colour: str | None = None) -> dict[str, Any]:
    """Return the look of the mark where a stage begins."""
    inside = {"markerfacecolor": theme.paper, "markeredgewidth": 1.1}
    return {"linestyle": "", "marker": MARKERS[0], "markersize": 5.5, "color": colour or theme.ink, **inside}
