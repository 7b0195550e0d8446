"""How fine the pattern of the tokens is: amplitude by frequency, and the share of the mean."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable

from pdvit.plots.lines import by_name, by_run, legend, name_depths, stacked, unique
from pdvit.plots.reading import Arrays, layers_of
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, depths, short, styled

NEEDED = ("by_frequency", "frequency")
SHARE, CURVE = "dc_share", "by_frequency"
# Runs beside one another.
COLUMNS = 2


def plot_spectrum(
    runs: Sequence[Arrays], tables: Sequence[pd.DataFrame], names: Sequence[str], theme: Theme = LIGHT
) -> Drawing:
    """Draw the relative log-amplitude by frequency, a line per layer, one panel per run; last, the DC share by layer.

    Args:
        runs: arrays of analysis/spectrum.npz: `by_frequency/LAYER` and `frequency/LAYER`.
        tables: the analyses they belong to, with the group spectrum.
        names: what each run is called.
        theme: colours.
    """
    shares = stacked([table[table["metric"] == SHARE] for table in tables], names)
    curves = _table(runs, names)
    columns = min(COLUMNS, len(runs)) + 1
    height = -(-len(runs) // (columns - 1))
    with styled(DOUBLE, 2.6 * height + 0.2, theme, height, columns) as figure:
        figure.data = pd.concat([curves, shares.drop(columns=["images", "tokens"])], ignore_index=True)
        grid = [figure.axes[row * columns : (row + 1) * columns] for row in range(height)]
        panels = [axes for row in grid for axes in row[:-1]]
        scale = depths(theme, int(curves["depth"].max()))
        low, high = curves["mean"].min(), curves["mean"].max()
        for axes, (name, rows) in zip(panels, by_run(curves), strict=False):
            _draw_curves(axes, rows, scale)
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            axes.set_title(short(name))
        for axes in panels[len(runs) :] + [row[-1] for row in grid[1:]]:
            axes.set_axis_off()
        panels[0].set_ylabel("Δ log amplitude")
        figure.colorbar(scale, ax=panels, label="depth", aspect=30, pad=0.02)
        _draw_shares(grid[0][-1], shares, theme)
        if len(runs) > 1:
            legend(figure, by_name(shares, theme))
        return figure


def _draw_curves(axes: Axes, rows: pd.DataFrame, scale: ScalarMappable) -> None:
    for depth, line in rows.groupby("depth"):
        axes.plot(line["frequency"], line["mean"], color=scale.to_rgba(np.asarray(depth)), linewidth=1.1)
    axes.set(xlabel="frequency / π", xlim=(0, 1))
    axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])


def _draw_shares(axes: Axes, shares: pd.DataFrame, theme: Theme) -> None:
    looks = by_name(shares, theme)
    for name, rows in by_run(shares):
        axes.plot(rows["depth"], rows["mean"], **looks[name])
        spread = rows["std"].fillna(0)
        low, high = (rows["mean"] - spread).clip(lower=0), (rows["mean"] + spread).clip(upper=1)
        axes.fill_between(rows["depth"], low, high, color=looks[name]["color"], alpha=0.15, linewidth=0)
    name_depths(axes, shares, ticks=6)
    axes.set(title="DC share of energy", ylim=(0, 1))


def _table(runs: Sequence[Arrays], names: Sequence[str]) -> pd.DataFrame:
    """Return one row per run, layer and frequency."""
    parts = []
    for arrays, name in zip(runs, unique(names), strict=True):
        for depth, layer in enumerate(layers_of(arrays, CURVE)):
            values = {"frequency": arrays[f"frequency/{layer}"], "mean": arrays[f"{CURVE}/{layer}"]}
            parts.append(pd.DataFrame({"run": name, "layer": layer, "depth": depth, "metric": CURVE, **values}))
    return pd.concat(parts, ignore_index=True)
