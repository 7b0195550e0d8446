"""Depth against P: one line per analysis, and the same model with random weights beside it."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pdvit.plots.lines import by_name, by_run, label_ends, name_depths, ring, stacked, stages
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, styled

METRIC, REFERENCE = "similarity", "similarity_random"
# Distance between the names of lines, and of the lowest from the axis, on the scale of P.
GAP, LOWEST = 0.058, 0.03
# How dark bands are, all together.
BANDS = 0.3
# The look of the reference.
RANDOM: dict[str, Any] = {"linestyle": (0, (2.5, 2)), "linewidth": 0.8}


def plot_similarity(tables: Sequence[pd.DataFrame], names: Sequence[str], theme: Theme = LIGHT) -> Drawing:
    """Draw P of every layer, mean and standard deviation over images, each line named at its end.

    Rings mark the first layer of a stage in hierarchical models. Dashed lines are the metric `similarity_random`: the
    same model with random weights.

    Args:
        tables: analyses as `read_analysis` returns them.
        names: what each line is called.
        theme: colours.
    """
    with styled(DOUBLE, 3.4, theme) as figure:
        (axes,) = figure.axes
        rows = stacked(tables, names)
        figure.data = rows[rows["metric"].isin([METRIC, REFERENCE])]
        axes.set_ylim(0, 1)
        draw_similarity(axes, figure.data, theme)
        ends = [(name, *_end(part), by_name(rows, theme)[name]["color"]) for name, part in by_run(figure.data, METRIC)]
        name_depths(axes, figure.data)
        axes.set_xlim(-0.3, max(x for _, x, _, _ in ends) + 0.1)
        label_ends(axes, ends, GAP, LOWEST, theme)
        axes.set_ylabel("P, patch similarity")
        axes.set_title(
            f"How alike the patches of an image are: mean |cos| over pairs\n"
            f"(line: mean over {_count(tables)}, band: ± one standard deviation)"
        )
        return figure


def draw_similarity(axes: Axes, rows: pd.DataFrame, theme: Theme) -> None:
    """Draw P of stacked analyses, with bands, stages and references, and a key to what is not named."""
    runs = by_name(rows, theme)
    parts = by_run(rows, METRIC)
    for name, part in parts:
        look = runs[name]
        axes.plot(part["depth"], part["mean"], **look, clip_on=False)
        low, high = part["mean"] - part["std"].fillna(0), part["mean"] + part["std"].fillna(0)
        alpha = min(0.15, BANDS / len(parts))
        axes.fill_between(part["depth"], low, high, color=look["color"], alpha=alpha, linewidth=0)
    references = by_run(rows, REFERENCE)
    for name, part in references:
        axes.plot(part["depth"], part["mean"], color=runs[name]["color"], **RANDOM)
    begun = [(name, stages(part)) for name, part in parts]
    for name, part in begun:
        if len(part):
            axes.plot(part["depth"], part["mean"], **ring(theme, runs[name]["color"]))
    key = []
    if any(len(part) for _, part in begun):
        key.append(Line2D([], [], label="a new stage: another grid of patches", **ring(theme)))
    if references:
        label = "thin: the same model with random weights"
        key.append(Line2D([], [], color=theme.ink, label=label, **RANDOM))
    if key:
        axes.legend(handles=key, loc="best", fontsize=7)


def _end(part: pd.DataFrame) -> tuple[float, float]:
    return float(part["depth"].iloc[-1]), float(part["mean"].iloc[-1])


def _count(tables: Sequence[pd.DataFrame]) -> str:
    least, most = (pick(int(table["images"].iloc[0]) for table in tables) for pick in (min, max))
    return f"{least} to {most} images" if least < most else f"{most} image{'s' if most > 1 else ''}"
