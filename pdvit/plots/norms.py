"""How long the tokens are: mean, spread and outliers by layer."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from pdvit.plots.lines import by_name, by_run, legend, limit, name_depths, stacked
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, styled

MEAN, SPREAD, PEAK, OUTLIERS = NEEDED = ("norm_mean", "norm_std", "norm_peak", "norm_outliers")
# From this ratio between the longest and the shortest on, lengths are drawn on a logarithmic axis.
WIDE = 30


def plot_norms(tables: Sequence[pd.DataFrame], names: Sequence[str], theme: Theme = LIGHT) -> Drawing:
    """Draw the length of tokens by layer in three panels: mean with spread over patches, peak, share of outliers.

    Args:
        tables: analyses as `read_analysis` returns them, with the group norms.
        names: what each line is called.
        theme: colours.
    """
    rows = stacked(tables, names)
    rows = rows[rows["metric"].isin(NEEDED)]
    runs = by_name(rows, theme)
    with styled(DOUBLE, 2.5, theme, columns=3) as figure:
        figure.data = rows
        length, peak, outliers = figure.axes
        for name, part in by_run(rows, MEAN):
            spread = rows[(rows["run"] == name) & (rows["metric"] == SPREAD)].set_index("depth")["mean"]
            reach = spread.reindex(part["depth"]).to_numpy()
            length.plot(part["depth"], part["mean"], **runs[name])
            low = (part["mean"] - reach).clip(lower=part["mean"] * 0.02)
            length.fill_between(
                part["depth"], low, part["mean"] + reach, color=runs[name]["color"], alpha=0.15, linewidth=0
            )
        for axes, metric, factor in ((peak, PEAK, 1), (outliers, OUTLIERS, 100)):
            for name, part in by_run(rows, metric):
                axes.plot(part["depth"], part["mean"] * factor, **runs[name], clip_on=False)
        means = rows[rows["metric"] == MEAN]["mean"]
        if means.min() > 0 and means.max() > WIDE * means.min():
            length.set_yscale("log")
            length.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # its own writes formulas
            length.yaxis.set_minor_formatter(NullFormatter())
        else:
            length.set_ylim(0)
        limit(peak, 1, None)
        limit(outliers, 0, None)
        outliers.set_ylim(0, max(1.0, outliers.get_ylim()[1]))
        length.set_title("length: mean ± std over patches")
        peak.set_title("longest token / median")
        outliers.set_title("outliers, % of patches")
        for axes in figure.axes:
            name_depths(axes, rows, ticks=8)
        legend(figure, runs)
        return figure
