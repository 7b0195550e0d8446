"""A curve per layer, coloured by depth, one panel per run: histograms of pairs and spectra."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pdvit.plots.depth import draw_metric, run_styles, stack
from pdvit.plots.reading import AnalyzedRun
from pdvit.plots.style import (
    DOUBLE,
    LIGHT,
    SINGLE,
    Drawing,
    Theme,
    depth_colours,
    legend,
    new_figure,
    panel_grid,
    shorten,
)

DC_SHARE = "dc_share"
# Heights of a layer's histogram and of what is around all, in inches; in layers, how far a histogram reaches up.
LAYER, AROUND, REACH = 0.2, 0.75, 1.7
PAIRS_COLUMNS, SPECTRUM_COLUMNS = 3, 2


def plot_pairs(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw histograms of cos over all pairs of patches, layer above layer; ticks are medians.

    The curves are `pairs`: `histogram/LAYER`, fractions, and `edges/LAYER`. Heights are square roots of fractions,
    scaled to the same maximum in each layer: tails stay visible, and a layer with one peak hides no other.
    """
    parts = []
    for run in runs:
        for depth, (layer, shares) in enumerate(run.curve("pairs", "histogram").items()):
            edges = run.curves["pairs"][f"edges/{layer}"]
            bars = {"from": edges[:-1], "to": edges[1:], "share": shares}
            parts.append(pd.DataFrame({"run": run.name, "layer": layer, "depth": depth, **bars}))
    data = pd.concat(parts, ignore_index=True)
    columns = min(PAIRS_COLUMNS, len(runs))
    width, height = SINGLE if len(runs) == 1 else DOUBLE, LAYER * (data["depth"].max() + 1) + AROUND
    with new_figure(width, -(-len(runs) // columns) * height, theme) as figure:
        figure.data = data
        panels = panel_grid(figure, len(runs), columns, sharex=True)
        for axes, (name, rows) in zip(panels, data.groupby("run", sort=False), strict=True):
            _draw_histograms(axes, rows, theme)
            axes.set(title=shorten(str(name)), ylabel="block")
        lowest = data[data["share"] > 0]["from"].min()
        figure.axes[0].set_xlim(max(-1.0, np.floor(lowest * 5) / 5), 1.0)
        figure.supxlabel("cos between two patches\n(height: root of the share of pairs; tick: median)", fontsize=8)
        return figure


def _draw_histograms(axes: Axes, rows: pd.DataFrame, theme: Theme) -> None:
    layers = [bars for _, bars in rows.groupby("depth")]
    colours = depth_colours(theme, len(layers) - 1).to_rgba(np.arange(len(layers)))
    for depth in range(len(layers) - 1, -1, -1):  # lower layers are in front of higher ones
        shares = layers[depth]["share"].to_numpy()
        edges = np.append(layers[depth]["from"], layers[depth]["to"].iloc[-1])
        top = depth + REACH * np.sqrt(shares / max(shares.max(), np.finfo(float).tiny))
        front = len(layers) - depth
        axes.stairs(top, edges, baseline=depth, color=theme.paper, linewidth=1.2, zorder=front + 1.5)
        axes.stairs(top, edges, baseline=depth, color=colours[depth], fill=True, alpha=0.9, zorder=front + 2)
        below = np.append(0, np.cumsum(shares))
        median = np.interp(below[-1] / 2, below, edges)
        axes.plot([median] * 2, [depth, depth + 0.45], color=theme.ink, linewidth=1, zorder=len(layers) + 3)
    labels = [str(bars["layer"].iloc[0]).removeprefix("block ") for bars in layers]
    axes.set_yticks(range(len(layers)), labels, fontsize=6.5)
    axes.set_ylim(-0.2, len(layers) - 1 + REACH + 0.2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")


def plot_spectrum(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw the relative log-amplitude by frequency, a line per layer; in the last panel the DC share by layer.

    The curves are `spectrum`: `by_frequency/LAYER` and `frequency/LAYER`.
    """
    parts = []
    for run in runs:
        for depth, (layer, mean) in enumerate(run.curve("spectrum", "by_frequency").items()):
            values = {"metric": "by_frequency", "frequency": run.curves["spectrum"][f"frequency/{layer}"], "mean": mean}
            parts.append(pd.DataFrame({"run": run.name, "layer": layer, "depth": depth, **values}))
    curves, shares = pd.concat(parts, ignore_index=True), stack(runs)
    shares = shares[shares["metric"] == DC_SHARE]
    columns = min(SPECTRUM_COLUMNS, len(runs)) + 1
    height = -(-len(runs) // (columns - 1))
    with new_figure(DOUBLE, 2.6 * height + 0.2, theme) as figure:
        figure.data = pd.concat([curves, shares.drop(columns=["images", "tokens"])], ignore_index=True)
        grid = figure.subplots(height, columns, squeeze=False)
        panels = grid[:, :-1].ravel()
        scale = depth_colours(theme, int(curves["depth"].max()))
        room = 0.05 * (curves["mean"].max() - curves["mean"].min())
        for axes, (name, rows) in zip(panels, curves.groupby("run", sort=False), strict=False):
            for at, line in rows.groupby("depth"):
                axes.plot(line["frequency"], line["mean"], color=scale.to_rgba(np.asarray(at)), linewidth=1.1)
            axes.set(title=shorten(str(name)), xlabel="frequency / π", xlim=(0, 1))
            axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            axes.set_ylim(curves["mean"].min() - room, curves["mean"].max() + room)
        for axes in [*panels[len(runs) :], *grid[1:, -1]]:
            axes.set_axis_off()
        panels[0].set_ylabel("Δ log amplitude")
        figure.colorbar(scale, ax=list(panels), label="depth", aspect=30, pad=0.02)
        draw_metric(grid[0, -1], shares, DC_SHARE, theme)
        if len(runs) > 1:
            legend(figure, run_styles(shares, theme))
        return figure
