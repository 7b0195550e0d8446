"""Small multiples: every metric of analysis.csv in a panel of its own."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pdvit.plots.lines import by_name, by_run, legend, limit, name_depths, stacked
from pdvit.plots.similarity import METRIC, RANDOM, REFERENCE
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, styled

COLUMNS = 4
# Height of a row of panels, and of the legend, in inches.
ROW, KEY = 1.35, 0.45
# What a panel is called, and the range of the metric.
RANGE = tuple[float | None, float | None]
COS, SHARE, POSITIVE = (-1, 1), (0, 1), (0, None)
TITLES: dict[str, tuple[str, RANGE]] = {
    "similarity": ("P, mean |cos|", SHARE),
    "similarity_signed": ("mean cos, signed", COS),
    "norm_mean": ("token length, mean", POSITIVE),
    "norm_std": ("token length, std", POSITIVE),
    "norm_peak": ("largest length / median", (1, None)),
    "norm_outliers": ("share of outliers", POSITIVE),
    "similarity_without_outliers": ("P without outliers", SHARE),
    "pairs_p05": ("cos of pairs, 5 %", COS),
    "pairs_p25": ("cos of pairs, 25 %", COS),
    "pairs_p50": ("cos of pairs, median", COS),
    "pairs_p75": ("cos of pairs, 75 %", COS),
    "pairs_p95": ("cos of pairs, 95 %", COS),
    "drift_cosine": ("cos with first layer", COS),
    "drift_retrieval": ("found again, share", SHARE),
    "effective_rank": ("effective rank", POSITIVE),
    "participation_ratio": ("participation ratio", POSITIVE),
    "dc_share": ("DC share of energy", SHARE),
    "high_frequency_share": ("high-frequency share", POSITIVE),
    "log_amplitude": ("Δ log amplitude at π", (None, None)),
    "attention_entropy": ("attention entropy, nats", POSITIVE),
    "attention_distance": ("att. distance, patches", POSITIVE),
    "attention_std": ("attention, row std", POSITIVE),
    "attention_similarity": ("att. like block before", SHARE),
    "cka_last": ("CKA with last layer", SHARE),
}


def title_of(metric: str) -> str:
    """Return what a metric is called in a figure."""
    return TITLES[metric][0] if metric in TITLES else metric.replace("_", " ")


def metrics_of(rows: pd.DataFrame) -> list[str]:
    """Return the metrics that get a panel, those that figures know first; the reference belongs to P's."""
    found = [str(metric) for metric in rows["metric"].unique() if metric != REFERENCE]
    known = [metric for metric in TITLES if metric in found]
    return known + [metric for metric in found if metric not in TITLES]


def plot_metrics(tables: Sequence[pd.DataFrame], names: Sequence[str], theme: Theme = LIGHT) -> Drawing:
    """Draw all metrics of some analyses by layer, each in its panel: mean over images, band of one standard deviation.

    Args:
        tables: analyses as `read_analysis` returns them; a metric that one lacks has no line of it.
        names: what each line is called.
        theme: colours.
    """
    rows = stacked(tables, names)
    metrics = metrics_of(rows)
    columns = min(COLUMNS, len(metrics))
    height = -(-len(metrics) // columns)
    with styled(DOUBLE, ROW * height + KEY, theme, height, columns) as figure:
        figure.data = rows
        for axes, metric in zip(figure.axes, metrics, strict=False):
            draw_metric(axes, rows, metric, theme)
        for axes in figure.axes[len(metrics) :]:
            axes.set_axis_off()
        for axes in figure.axes[: len(metrics) - columns]:
            axes.set_xlabel("")
        reference = Line2D([], [], color=theme.ink, label="P of random weights", **RANDOM)
        legend(figure, by_name(rows, theme), [reference] * bool((rows["metric"] == REFERENCE).any()))
        return figure


def draw_metric(axes: Axes, rows: pd.DataFrame, metric: str, theme: Theme) -> None:
    """Draw one metric of stacked analyses over depth; bands end where the metric does."""
    looks, (low, high) = by_name(rows, theme), TITLES.get(metric, ("", (None, None)))[1]
    for name, part in by_run(rows, metric):
        look = looks[name] | {"linewidth": 1.0, "markersize": 2.2, "clip_on": False}
        axes.plot(part["depth"], part["mean"], **look)
        spread = part["std"].fillna(0)
        below, above = ((part["mean"] + sign * spread).clip(low, high) for sign in (-1, 1))
        axes.fill_between(part["depth"], below, above, color=look["color"], alpha=0.13, linewidth=0)
    if metric == METRIC:
        for name, part in by_run(rows, REFERENCE):
            axes.plot(part["depth"], part["mean"], color=looks[name]["color"], **RANDOM)
    name_depths(axes, rows, ticks=6)
    axes.set_xlim(rows["depth"].min() - 0.4, rows["depth"].max() + 0.4)
    axes.set_title(title_of(metric), fontsize=7.5)
    axes.tick_params(labelsize=6.5)
    limit(axes, low if low is None or low >= 0 else None, high)
