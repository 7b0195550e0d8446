"""Depth against P: one line per analysis."""

import pandas as pd
from matplotlib.figure import Figure

from pdvit.plots.style import looks, spread_out, styled


def plot_similarity(tables: list[pd.DataFrame], names: list[str]) -> Figure:
    """Draw P of every layer, mean and standard deviation over images, each line named at its end.

    Args:
        tables: analyses as `pdvit analyze` writes them.
        names: what each line is called.
    """
    with styled(6.6, 3.8) as figure:
        (axes,) = figure.axes
        ends = []
        for table, look in zip(tables, looks(len(tables)), strict=True):
            rows = table[table["metric"] == "similarity"].sort_values("depth")
            axes.plot(rows["depth"], rows["mean"], **look)
            low, high = rows["mean"] - rows["std"].fillna(0), rows["mean"] + rows["std"].fillna(0)
            axes.fill_between(rows["depth"], low, high, color=str(look["color"]), alpha=0.15, linewidth=0)
            ends.append((rows["depth"].iloc[-1], rows["mean"].iloc[-1], str(look["color"])))
        axes.set_ylim(0, 1)
        heights = spread_out([height for _, height, _ in ends], gap=0.06)
        right = max(depth for depth, _, _ in ends)
        for (depth, value, colour), height, name in zip(ends, heights, names, strict=True):
            axes.annotate(
                name,
                xy=(depth, value),
                xytext=(right + 0.03 * right, height),
                color=colour,
                va="center",
                annotation_clip=False,
            )
        _name_depths(figure, tables)
        axes.set_ylabel("P, patch similarity")
        images = sorted({int(table["images"].iloc[0]) for table in tables})
        count = f"{images[0]}" if len(images) == 1 else f"{images[0]} to {images[-1]}"
        axes.set_title(
            f"How alike the patches of an image are: mean |cos| over pairs\n"
            f"(line: mean over {count} images, band: ± one standard deviation)"
        )
        return figure


def _name_depths(figure: Figure, tables: list[pd.DataFrame]) -> None:
    """Label depth 0 as embed, whole numbers as blocks, and the last as norm where all lines agree on it."""
    (axes,) = figure.axes
    layers = {int(d): str(n) for table in tables for d, n in zip(table["depth"], table["layer"], strict=True)}
    clashes = len({table["depth"].max() for table in tables}) > 1
    step = max(1, round(max(layers) / 12))
    shown = {depth: name for depth, name in layers.items() if depth % step == 0 or not name.startswith("block")}
    ticks = sorted(shown)
    labels = [shown[tick].removeprefix("block ") for tick in ticks]
    if clashes:
        labels = [str(tick) if tick else "embed" for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_xlabel("layer" if clashes else "block")
