"""Where the heads look: entropy and distance of attention, head by head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pdvit.plots.lines import by_name, legend, name_depths, unique
from pdvit.plots.reading import Arrays, layers_of
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, styled

NEEDED = ("entropy", "distance")
TITLES = {"entropy": "entropy, nats", "distance": "mean distance, patches"}
# How far the heads of several runs stand apart.
APART = 0.22


def plot_attention(
    runs: Sequence[Arrays], tables: Sequence[pd.DataFrame], names: Sequence[str], theme: Theme = LIGHT
) -> Drawing:
    """Draw entropy and distance of attention by block: a dot for each head, a line for their mean.

    The dashed line is the most that entropy can be: ln of the number of patches, attention to all alike.

    Args:
        runs: arrays of analysis/attention.npz: `entropy/LAYER` and `distance/LAYER`, one value per head.
        tables: the analyses they belong to, for the number of patches.
        names: what each run is called.
        theme: colours.
    """
    data = _table(runs, tables, names)
    looks = by_name(data, theme)
    shifts = APART * (np.arange(len(looks)) - (len(looks) - 1) / 2)
    with styled(DOUBLE, 2.7, theme, columns=2) as figure:
        figure.data = data
        for axes, curve in zip(figure.axes, NEEDED, strict=True):
            for (name, look), shift in zip(looks.items(), shifts, strict=True):
                rows = data[(data["run"] == name) & (data["curve"] == curve)]
                heads = {"linestyle": "", "marker": look["marker"], "alpha": 0.5, "markersize": 2.6}
                axes.plot(rows["depth"] + shift, rows["value"], color=look["color"], markeredgewidth=0, **heads)
                mean = rows.groupby("depth")["value"].mean()
                axes.plot(mean.index, mean, **{**look, "marker": ""})
            name_depths(axes, data)
            axes.set(title=TITLES[curve], ylim=(0, 1.06 * data[data["curve"] == curve]["value"].max()))
        _mark_uniform(figure, data, theme)
        legend(figure, looks)
        return figure


def _mark_uniform(figure: Drawing, data: pd.DataFrame, theme: Theme) -> None:
    """Mark the entropy of attention to all patches alike, for up to three numbers of them."""
    axes = figure.axes[0]
    counts = data["tokens"].unique()
    for count in counts[:3]:
        axes.axhline(np.log(count), color=theme.muted, linestyle=(0, (4, 2)), linewidth=0.8)
        place = (1, np.log(count))
        text = f"uniform: ln {count}"
        offset: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 2), "ha": "right", "va": "bottom"}
        axes.annotate(text, place, xycoords=("axes fraction", "data"), color=theme.muted, fontsize=7, **offset)
    axes.set_ylim(0, 1.1 * max(np.log(counts.max()), data[data["curve"] == "entropy"]["value"].max()))


def _table(runs: Sequence[Arrays], tables: Sequence[pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    """Return one row per run, curve, layer and head."""
    parts = []
    for arrays, table, name in zip(runs, tables, unique(names), strict=True):
        places = table.drop_duplicates("layer").set_index("layer")
        for curve in NEEDED:
            for layer in layers_of(arrays, curve):
                values = arrays[f"{curve}/{layer}"]
                where = {"layer": layer, "depth": places["depth"][layer], "tokens": places["tokens"][layer]}
                heads = {"head": np.arange(1, len(values) + 1), "value": values}
                parts.append(pd.DataFrame({"run": name, "curve": curve, **where, **heads}))
    return pd.concat(parts, ignore_index=True)
