"""Two checkpoints side by side: P of both, their difference, and every other metric that both have."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pdvit.plots.lines import by_name, legend, name_depths, stacked, unique
from pdvit.plots.metrics import COLUMNS, ROW, draw_metric, metrics_of
from pdvit.plots.similarity import METRIC, draw_similarity
from pdvit.plots.statistics import welch
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, short, styled

# Height of the panels of P, in inches.
TOP = 2.5
MINUS = "\u2212"


def plot_compare(tables: Sequence[pd.DataFrame], names: Sequence[str], theme: Theme = LIGHT) -> Drawing:
    """Draw P of two analyses, second minus first with a 95 % confidence interval, and the other metrics of both.

    The interval is Welch's: the tables hold means and spreads over images, so images can't be paired. Differences stand
    at the layers that both have by name.

    Args:
        tables: two analyses as `read_analysis` returns them.
        names: what they are called.
        theme: colours.
    """
    both = set.intersection(*(set(table["metric"]) for table in tables))
    rows = stacked([table[table["metric"].isin(both)] for table in tables], names)
    others = [metric for metric in metrics_of(rows) if metric != METRIC]
    height = -(-len(others) // COLUMNS)
    with styled(DOUBLE, TOP + ROW * height + 0.3, theme, rows=0) as figure:
        grid = figure.add_gridspec(1 + height, COLUMNS, height_ratios=[TOP] + [ROW] * height)
        left, right = figure.add_subplot(grid[0, :2]), figure.add_subplot(grid[0, 2:])
        draw_similarity(left, rows, theme)
        left.set(ylim=(0, 1), title="P, mean |cos|")
        name_depths(left, rows, ticks=8)
        apart = differences(tables, METRIC)
        _draw_difference(right, apart, theme)
        first, second = (short(name, 22) for name in unique(names))
        right.set_title(f"P of {second} {MINUS} P of {first}\n(bars: 95 % confidence)")
        for at, metric in enumerate(others):
            panel = figure.add_subplot(grid[1 + at // COLUMNS, at % COLUMNS])
            draw_metric(panel, rows, metric, theme)
            if at < len(others) - COLUMNS:
                panel.set_xlabel("")
        legend(figure, by_name(rows, theme))
        figure.data = pd.concat([rows, apart.assign(run="difference")], ignore_index=True)
        return figure


def differences(tables: Sequence[pd.DataFrame], metric: str) -> pd.DataFrame:
    """Return second minus first of a metric, one row for each layer that both have by name: mean, low and high."""
    first, second = (table[table["metric"] == metric].set_index("layer") for table in tables)
    rows = []
    for layer in first.index.intersection(second.index, sort=False):
        pair = (first.loc[layer], second.loc[layer])
        means, stds, counts = (tuple(row[key] for row in pair) for key in ("mean", "std", "images"))
        found = welch(means, stds, counts)
        values = {"mean": found.mean, "low": found.low, "high": found.high}
        rows.append({"layer": layer, "depth": int(pair[0]["depth"]), "metric": metric, **values})
    return pd.DataFrame(rows, columns=["layer", "depth", "metric", "mean", "low", "high"])


def _draw_difference(axes: Axes, rows: pd.DataFrame, theme: Theme) -> None:
    reach = [rows["mean"] - rows["low"].fillna(rows["mean"]), rows["high"].fillna(rows["mean"]) - rows["mean"]]
    look: dict[str, Any] = {"marker": "o", "linestyle": "-", "linewidth": 0.8, "elinewidth": 1.1, "capsize": 2}
    axes.axhline(0, color=theme.muted, linewidth=0.8)
    axes.errorbar(rows["depth"], rows["mean"], reach, color=theme.ink, **look)
    name_depths(axes, rows.assign(run=""), ticks=8)
