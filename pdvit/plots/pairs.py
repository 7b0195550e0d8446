"""How the similarities of pairs of patches are distributed: one histogram per layer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pdvit.plots.lines import unique
from pdvit.plots.reading import Arrays, layers_of
from pdvit.plots.style import DOUBLE, LIGHT, SINGLE, Drawing, Theme, depths, short, styled

NEEDED = ("histogram", "edges")
# Height of a layer, and of what is around, in inches; how far a histogram reaches into the layer above.
LAYER, AROUND, REACH = 0.2, 0.75, 1.7
# Panels beside one another.
COLUMNS = 3


def plot_pairs(runs: Sequence[Arrays], names: Sequence[str], theme: Theme = LIGHT) -> Drawing:
    """Draw the histogram of cos over all pairs of patches, layer above layer, one panel per run; ticks are medians.

    Heights are square roots of the shares, scaled to the same largest in each layer: so tails are seen, and a layer
    whose pairs are all alike does not flatten the others.

    Args:
        runs: arrays of analysis/pairs.npz: `histogram/LAYER`, shares, and `edges/LAYER`.
        names: what each panel is called.
        theme: colours.
    """
    data = _table(runs, names)
    columns = min(COLUMNS, len(runs))
    height = -(-len(runs) // columns)
    deepest = int(data["depth"].max()) + 1
    width = SINGLE if len(runs) == 1 else DOUBLE
    with styled(width, height * (LAYER * deepest + AROUND), theme, height, columns, sharex=True) as figure:
        figure.data = data
        for axes, (name, rows) in zip(figure.axes, data.groupby("run", sort=False), strict=False):
            _ridges(axes, rows, theme)
            axes.set_title(short(str(name)))
            axes.set_ylabel("block")
        for axes in figure.axes[len(runs) :]:
            axes.set_axis_off()
        lowest = data[data["share"] > 0]["from"].min()
        figure.axes[0].set_xlim(max(-1.0, np.floor(lowest * 5) / 5), 1.0)
        figure.supxlabel("cos between two patches\n(height: root of the share of pairs; tick: median)", fontsize=8)
        return figure


def _table(runs: Sequence[Arrays], names: Sequence[str]) -> pd.DataFrame:
    """Return one row per run, layer and bar."""
    parts = []
    for arrays, name in zip(runs, unique(names), strict=True):
        for depth, layer in enumerate(layers_of(arrays, "histogram")):
            edges, shares = arrays[f"edges/{layer}"], arrays[f"histogram/{layer}"]
            bars = {"from": edges[:-1], "to": edges[1:], "share": shares}
            parts.append(pd.DataFrame({"run": name, "layer": layer, "depth": depth, **bars}))
    return pd.concat(parts, ignore_index=True)


def _ridges(axes: Axes, rows: pd.DataFrame, theme: Theme) -> None:
    layers = list(rows.groupby("depth", sort=True))
    colours = depths(theme, len(layers) - 1)
    for depth, bars in layers[::-1]:
        at, shares = float(depth), bars["share"].to_numpy()  # type: ignore[arg-type]
        heights = REACH * np.sqrt(shares / max(shares.max(), np.finfo(float).tiny))
        colour = colours.to_rgba(np.asarray(at))
        edges = np.append(bars["from"], bars["to"].iloc[-1])
        front = len(layers) - at + 2
        axes.stairs(at + heights, edges, baseline=at, color=theme.paper, linewidth=1.2, zorder=front - 0.5)
        axes.stairs(at + heights, edges, baseline=at, fill=True, color=colour, alpha=0.9, zorder=front)
        middle = _median(edges, shares)
        axes.plot([middle] * 2, [at, at + 0.45], color=theme.ink, linewidth=1, zorder=len(layers) + 3)
    labels = [str(bars["layer"].iloc[0]).removeprefix("block ") for _, bars in layers]
    axes.set_yticks(range(len(layers)), labels, fontsize=6.5)
    axes.set_ylim(-0.2, len(layers) - 1 + REACH + 0.2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")


def _median(edges: np.ndarray, shares: np.ndarray) -> float:
    """Return where half of the pairs lie below, linear within a bar."""
    below = np.append(0, np.cumsum(shares))
    return float(np.interp(below[-1] / 2, below, edges))
