"""Analyses by layer: metrics over depth with one line per run, attention by head, histograms of pairs and spectra."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from scipy.special import stdtrit

from pdvit.definitions import DEFINITIONS
from pdvit.errors import UserError
from pdvit.plots import style
from pdvit.plots.reading import AnalyzedRun
from pdvit.plots.style import DOUBLE, LIGHT, MARKERS, SINGLE, Drawing, Theme
from pdvit.plots.sweep import LEVEL, MINUS

P, RANDOM = "similarity", "similarity_random"
NORM, NORM_STD = "norm_mean", "norm_std"
NORMS = (NORM, "norm_peak", "norm_outliers")
ATTENTION = {"entropy": "entropy, nats", "distance": "mean distance, patches"}
COLUMNS = 4  # small panels in a row
SINGLE_PANEL, LARGE, SMALL, KEY = 2.9, 2.2, 1.35, 0.45  # heights of rows of panels and of the legend, in inches
RANDOM_STYLE: dict[str, Any] = {"linestyle": (0, (2.5, 2)), "linewidth": 0.8}
LOG_RATIO = 30  # lengths that differ more than this have a logarithmic axis
HEAD_SHIFT = 0.22  # in depth, between the heads of two runs
LAYER, AROUND = 0.2, 0.75  # heights of a layer's histogram and of the margins, in inches
REACH = 1.7  # height of the highest histogram, in layers


def plot_similarity(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw P by layer; rings mark stages, thin lines random weights."""
    rows = stack(runs)
    rows = rows[rows["metric"].isin([P, RANDOM])]
    with _panels(rows, (P,), (), theme) as (figure, panels):
        title = "P by layer: mean over images, band of ± one standard deviation"
        panels[P].set(ylabel="P, patch similarity", title=title)
        name_depths(panels[P].xaxis, rows, ticks=12)
        return figure


def similarity(*analyses: Any, ax: Axes | None = None) -> Axes:
    """Draw P by layer of analyses or tables on axes, by default new ones of pyplot; UserError if one has no P."""
    tables = [getattr(analysis, "table", analysis) for analysis in analyses]
    names = style.unique([str(table["model"].iloc[0]) for table in tables])
    if missing := [name for name, table in zip(names, tables, strict=True) if P not in set(table["metric"])]:
        raise UserError(f"the analysis of {missing[0]} has no P", "similarity(...)", f"add '{P}' to its metrics")
    rows = stack([AnalyzedRun(name, table) for name, table in zip(names, tables, strict=True)])
    if ax is None:
        import matplotlib.pyplot as plt  # shows figures in a notebook; it sets up its backend outside the context

        figure = plt.figure(figsize=(1.4 * SINGLE, SINGLE_PANEL), layout="constrained")
    with mpl.rc_context(style.RC):
        ax = figure.subplots() if ax is None else ax
        draw_metric(ax, rows, P, LIGHT)
        ax.set(ylabel="P, patch similarity", title="")
        lines = [Line2D([], [], label=name, **line) for name, line in run_styles(rows, LIGHT).items()]
        ax.legend(handles=[*lines, *_keys(rows, LIGHT)])
    return ax


def plot_metrics(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw every metric in a small panel; a run without the metric has no line there."""
    rows = stack(runs)
    with _panels(rows, (), metrics_of(rows), theme) as (figure, _):
        return figure


def plot_norms(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw token lengths: mean with the spread over patches, longest over median, share of outliers."""
    rows = stack(runs)
    with _panels(rows[rows["metric"].isin([*NORMS, NORM_STD])], NORMS, (), theme) as (figure, _):
        return figure


def plot_compare(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw P of two analyses, second minus first with a 95 % interval, and all other metrics that both have."""
    rows = stack(runs)
    rows = rows[rows["metric"].isin(set.intersection(*(set(run.table["metric"]) for run in runs)))]
    change = differences([run.table for run in runs], P)
    others = [metric for metric in metrics_of(rows) if metric != P]
    with _panels(rows, (P, "difference"), others, theme) as (figure, panels):
        axes = panels["difference"]
        reach = [change["mean"] - change["low"], change["high"] - change["mean"]]  # of NaN nothing is drawn
        axes.axhline(0, color=theme.muted, linewidth=0.8)
        bars: dict[str, Any] = {"marker": "o", "linestyle": "-", "linewidth": 0.8, "elinewidth": 1.1, "capsize": 2}
        axes.errorbar(change["depth"], change["mean"], reach, color=theme.ink, **bars)
        name_depths(axes.xaxis, change.assign(run=""))
        first, second = (style.shorten(run.name, 22) for run in runs)
        axes.set_title(f"P of {second} {MINUS} P of {first}\n(bars: 95 % confidence)")
        figure.data = pd.concat([rows, change.assign(run="difference")], ignore_index=True)
        return figure


def plot_attention(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw entropy and distance of attention by block: a dot per head, a line for their mean; dashed: uniform."""
    parts = [
        pd.DataFrame({**place, "curve": curve, "head": range(1, 1 + len(values)), "value": values})
        for run in runs
        for curve in ATTENTION
        for place, values in _layers([run], "attention", curve)
    ]
    data = pd.concat(parts, ignore_index=True)[["run", "curve", "layer", "depth", "tokens", "head", "value"]]
    styles = run_styles(data, theme)
    with style.new_figure(data, DOUBLE, 2.7, theme) as figure:
        for axes, (curve, title) in zip(figure.subplots(1, 2), ATTENTION.items(), strict=True):
            part = data[data["curve"] == curve]
            for number, (name, line) in enumerate(styles.items()):
                rows = part[part["run"] == name]
                heads: dict[str, Any] = {**line, "linestyle": "", "alpha": 0.5, "markersize": 2.6}
                shift = HEAD_SHIFT * (number - (len(styles) - 1) / 2)
                axes.plot(rows["depth"] + shift, rows["value"], markeredgewidth=0, **heads)
                mean = rows.groupby("depth")["value"].mean()
                axes.plot(mean.index, mean, **{**line, "marker": ""})
            name_depths(axes.xaxis, data, ticks=12)
            axes.set(title=title, ylim=(0, 1.06 * part["value"].max()))
        counts, entropy = data["tokens"].unique(), figure.axes[0]
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        for count in counts[:3]:
            entropy.axhline(np.log(count), color=theme.muted, linestyle=(0, (4, 2)), linewidth=0.8)
            entropy.annotate(f"uniform: ln {count}", (1, np.log(count)), (0, 2), color=theme.muted, fontsize=7, **place)
        entropy.set_ylim(0, max(1.1 * np.log(counts.max()), entropy.get_ylim()[1]))
        style.legend(figure, styles)
        return figure


def plot_pairs(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw histograms of cos over all pairs of patches, layer above layer; ticks are medians.

    Heights are square roots of fractions, so that tails stay visible, with the same maximum in each layer.
    """
    parts = [
        pd.DataFrame({**place, "from": edges[:-1], "to": edges[1:], "share": shares})
        for place, shares, edges in _layers(runs, "pairs", "histogram", "edges")
    ]
    data = pd.concat(parts, ignore_index=True).drop(columns="tokens")
    height = LAYER * (data["depth"].max() + 1) + AROUND
    with style.run_panels(data, height, theme, sharex=True) as (figure, panels):
        for axes, rows in panels:
            _draw_histograms(axes, rows, theme)
            axes.set_ylabel("block")
        figure.axes[0].set_xlim(max(-1.0, np.floor(data[data["share"] > 0]["from"].min() * 5) / 5), 1.0)
        figure.supxlabel("cos between two patches\n(height: root of the share of pairs; tick: median)", fontsize=8)
        return figure


def _draw_histograms(axes: Axes, rows: pd.DataFrame, theme: Theme) -> None:
    layers = [bars for _, bars in rows.groupby("depth")]
    colours = style.depth_colours(theme, len(layers) - 1).to_rgba(np.arange(len(layers)))
    for depth in range(len(layers) - 1, -1, -1):  # lower layers cover higher ones
        shares = layers[depth]["share"].to_numpy()
        edges = np.append(layers[depth]["from"], layers[depth]["to"].iloc[-1])
        top = depth + REACH * np.sqrt(shares / max(shares.max(), np.finfo(float).tiny))
        axes.stairs(top, edges, baseline=depth, color=theme.paper, linewidth=1.2)
        axes.stairs(top, edges, baseline=depth, color=colours[depth], fill=True, alpha=0.9)
        below = np.append(0, np.cumsum(shares))
        median = np.interp(below[-1] / 2, below, edges)
        axes.plot([median] * 2, [depth, depth + 0.45], color=theme.ink, linewidth=1)
    style.name_layers(axes.yaxis, rows["layer"].unique(), len(layers), fontsize=6.5)
    axes.set_ylim(-0.2, len(layers) - 1 + REACH + 0.2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")


def plot_spectrum(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw the relative log-amplitude by frequency, a line per layer."""
    parts = [
        pd.DataFrame({**place, "frequency": frequency, "log_amplitude": mean})
        for place, mean, frequency in _layers(runs, "spectrum", "by_frequency", "frequency")
    ]
    data = pd.concat(parts, ignore_index=True).drop(columns="tokens")
    scale = style.depth_colours(theme, int(data["depth"].max()))
    with style.run_panels(data, 2.6, theme, sharey=True) as (figure, panels):
        for axes, rows in panels:
            for at, line in rows.groupby("depth"):
                axes.plot(line["frequency"], line["log_amplitude"], color=scale.to_rgba(np.asarray(at)), linewidth=1.1)
            axes.set(xlabel="frequency / π", xlim=(0, 1))
            axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        figure.axes[0].set_ylabel("Δ log amplitude")
        name_depths(figure.colorbar(scale, ax=figure.axes, aspect=30, pad=0.02).ax.yaxis, data)
        return figure


def _layers(runs: Sequence[AnalyzedRun], group: str, *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield run, layer, depth and tokens of each layer, and its arrays of these names."""
    for run in runs:
        layers = run.table.drop_duplicates("layer").set_index("layer")[["depth", "tokens"]]
        for layer in run.curve(group, names[0]):
            place = {"run": run.name, "layer": layer, **layers.loc[layer]}
            yield place, *(run.curves[group][f"{name}/{layer}"] for name in names)


def stack(runs: Sequence[AnalyzedRun]) -> pd.DataFrame:
    """Return analyses as one table with the name of the run in its first column, ordered by depth."""
    parts = [run.table.assign(run=run.name).sort_values("depth", kind="stable") for run in runs]
    rows = pd.concat(parts, ignore_index=True).drop(columns="model", errors="ignore")
    return rows[["run", *rows.columns.drop("run")]]


def metrics_of(rows: pd.DataFrame) -> list[str]:
    """Return the metrics that get a panel, in the order of their definitions; P of random weights is drawn with P."""
    names = [str(metric) for metric in rows["metric"].unique() if metric != RANDOM]
    return [*(name for name in DEFINITIONS if name in names), *(name for name in names if name not in DEFINITIONS)]


def run_styles(rows: pd.DataFrame, theme: Theme) -> dict[str, dict[str, Any]]:
    """Return the line style of each run, the same in all panels."""
    names = [str(name) for name in rows["run"].unique()]
    return dict(zip(names, style.line_styles(len(names), theme), strict=True))


def differences(tables: Sequence[pd.DataFrame], metric: str) -> pd.DataFrame:
    """Return second minus first of a metric with Welch's 95 % interval (images can't be paired), by layer of both."""
    first, second = (table[table["metric"] == metric] for table in tables)
    both = first.merge(second, on="layer", suffixes=("", "_2"))
    change = both["mean_2"] - both["mean"]
    one, two = both["std"] ** 2 / both["images"], both["std_2"] ** 2 / both["images_2"]
    freedom = (one + two) ** 2 / (one**2 / (both["images"] - 1) + two**2 / (both["images_2"] - 1))
    half = (stdtrit(freedom, LEVEL) * (one + two) ** 0.5).where(one + two > 0, one + two)
    return both[["layer", "depth"]].assign(metric=metric, mean=change, low=change - half, high=change + half)


@contextmanager
def _panels(
    rows: pd.DataFrame, large: Sequence[str], small: Sequence[str], theme: Theme
) -> Iterator[tuple[Drawing, dict[str, Axes]]]:
    """Draw metrics in a row of large panels and rows of small ones below; yield the panels by name."""
    columns = min(COLUMNS, len(small))
    lines = [small[at : at + columns] for at in range(0, len(small), columns or 1)]
    layout = [np.repeat([*line, *["."] * (columns - len(line))], 12 // columns) for line in lines]
    layout = [np.repeat(large, 12 // len(large)), *layout] if large else layout
    heights = [LARGE if len(large) > 1 else SINGLE_PANEL] * bool(large) + [SMALL] * len(lines)
    with style.new_figure(rows, DOUBLE, sum(heights) + KEY, theme) as figure:
        panels = figure.subplot_mosaic([list(line) for line in layout], height_ratios=heights)
        for name, axes in panels.items():
            if (rows["metric"] == name).any():
                draw_metric(axes, rows, name, theme, small=name in small)
        for name in small[:-columns]:
            panels[name].set_xlabel("")
        style.legend(figure, run_styles(rows, theme), _keys(rows, theme))
        yield figure, panels


def draw_metric(axes: Axes, rows: pd.DataFrame, metric: str, theme: Theme, small: bool = False) -> None:
    """Draw a metric over depth: a line per run, and a band of the deviation over images (of lengths, over patches)."""
    styles, chosen = run_styles(rows, theme), rows[rows["metric"] == metric]
    known = DEFINITIONS.get(metric)  # other versions measure other metrics
    title = (known and known.title) or metric.replace("_", " ")
    low, high = (known.low, known.high) if known else (None, None)
    sizes: dict[str, Any] = {"linewidth": 1.0, "markersize": 2.2} if small else {}
    for name, line in chosen.groupby("run", sort=False):
        axes.plot(line["depth"], line["mean"], **styles[str(name)], **sizes, clip_on=False)
        own, colour, std = rows[rows["run"] == name], styles[str(name)]["color"], line["std"]
        if metric == NORM:
            std = own[own["metric"] == NORM_STD].set_index("depth")["mean"].reindex(line["depth"]).set_axis(line.index)
        below, above = ((line["mean"] + sign * std.fillna(0)).clip(low, high) for sign in (-1, 1))
        axes.fill_between(line["depth"], below, above, linewidth=0, color=colour, alpha=min(0.15, 0.3 / len(styles)))
        random, stages = own[own["metric"] == RANDOM], _stages(line)
        if metric == P and len(random):
            axes.plot(random["depth"], random["mean"], color=colour, **RANDOM_STYLE)
        if metric == P and len(stages):
            axes.plot(stages["depth"], stages["mean"], **_ring(theme, colour, small))
    name_depths(axes.xaxis, rows, ticks=6 if small else 8)
    axes.set_xlim(rows["depth"].min() - 0.4, rows["depth"].max() + 0.4)
    axes.set_title(title, fontsize=7.5 if small else 8.5)
    axes.tick_params(labelsize=6.5 if small else 7)
    least, most = chosen["mean"].min(), chosen["mean"].max()
    if metric == NORM and most > LOG_RATIO * least > 0:
        axes.set(yscale="log", ylim=(least / 2, most * 2))
        axes.yaxis.set_major_formatter("{x:g}")  # the default writes formulas
        axes.minorticks_off()
    else:  # the axis ends where the metric's range ends; elsewhere it has a margin
        axes.set_ylim(None if low == -1 else low, high)


def _stages(line: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose grid of patches differs from that of the row before."""
    return line[line["tokens"].ne(line["tokens"].shift(fill_value=line["tokens"].iloc[0]))]


def _ring(theme: Theme, colour: str, small: bool = False) -> dict[str, Any]:
    size = {"markersize": 3.5 if small else 5.5, "markeredgewidth": 1.1, "markerfacecolor": theme.paper}
    return {"linestyle": "", "marker": MARKERS[0], "color": colour, **size}


def _keys(rows: pd.DataFrame, theme: Theme) -> list[Line2D]:
    """Return the legend's entries for random weights and stages, where there are any."""
    keys = []
    if (rows["metric"] == RANDOM).any():
        keys.append(Line2D([], [], color=theme.ink, label="P of random weights", **RANDOM_STYLE))
    if any(len(_stages(line)) for _, line in rows[rows["metric"] == P].groupby("run")):
        keys.append(Line2D([], [], label="a new stage", **_ring(theme, theme.ink)))
    return keys


def name_depths(axis: Axis, rows: pd.DataFrame, ticks: int = 8) -> None:
    """Name the depths: embed, blocks by number, and norm where all runs end at the same depth."""
    same = rows.groupby("run")["depth"].max().nunique() == 1
    layers = dict(zip(rows["depth"], rows["layer"].astype(str), strict=True))
    names = {at: layers[at] if same or at == 0 else str(at) for at in sorted(layers)}
    style.name_ticks(axis, {at: name.removeprefix("block ") for at, name in names.items()}, ticks)
    axis.set_label_text("block" if same else "depth")
