"""Depth against P: one line per analysis."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from pdvit.errors import UserError
from pdvit.plots.style import looks, short, spread_out, styled

# Distance between the names of lines, and of the lowest from the axis, on the scale of P.
GAP, LOWEST = 0.06, 0.03
# Ticks beside one another on the axis.
TICKS = 12


def read_analysis(run: Path) -> pd.DataFrame:
    """Read analysis.csv; UserError where it is damaged or has no P."""
    file = run / "analysis.csv"
    try:
        table = pd.read_csv(file)
        numbers = {"depth": int, "mean": float, "std": float, "images": int}
        rows = table[table["metric"] == "similarity"].astype({**numbers, "layer": str})
        if rows.empty or rows["mean"].isna().any():
            raise ValueError("it has no values of the metric similarity")
    except (OSError, ValueError, KeyError, TypeError) as error:  # pandas words these for programmers
        what = "the analysis is damaged, or not one of pdvit analyze"
        raise UserError(what, str(file), f"measure it again: pdvit analyze {run}") from error
    return table


def plot_similarity(tables: list[pd.DataFrame], names: list[str]) -> Figure:
    """Draw P of every layer, mean and standard deviation over images, each line named at its end.

    Args:
        tables: analyses as `read_analysis` returns them.
        names: what each line is called.
    """
    with styled(6.6, 3.8) as figure:
        (axes,) = figure.axes
        ends = []
        for table, look in zip(tables, looks(len(tables)), strict=True):
            rows = table[table["metric"] == "similarity"].sort_values("depth")
            axes.plot(rows["depth"], rows["mean"], **look)
            low, high = rows["mean"] - rows["std"].fillna(0), rows["mean"] + rows["std"].fillna(0)
            axes.fill_between(rows["depth"], low, high, color=look["color"], alpha=0.15, linewidth=0)
            ends.append((rows["depth"].iloc[-1], rows["mean"].iloc[-1], look["color"]))
        axes.set_ylim(0, 1)
        heights = spread_out([max(height, LOWEST) for _, height, _ in ends], GAP)
        lift = max(0.0, LOWEST - min(heights))
        right = max(depth for depth, _, _ in ends)
        for (depth, value, colour), height, name in zip(ends, heights, names, strict=True):
            beside = (right + 0.03 * right, height + lift)
            axes.annotate(short(name), (depth, value), beside, color=colour, va="center", annotation_clip=False)
        _name_depths(figure, tables)
        axes.set_ylabel("P, patch similarity")
        axes.set_title(
            f"How alike the patches of an image are: mean |cos| over pairs\n"
            f"(line: mean over {_count(tables)}, band: ± one standard deviation)"
        )
        return figure


def _count(tables: list[pd.DataFrame]) -> str:
    least, most = (pick(int(table["images"].iloc[0]) for table in tables) for pick in (min, max))
    return f"{least} to {most} images" if least < most else f"{most} image{'s' if most > 1 else ''}"


def _name_depths(figure: Figure, tables: list[pd.DataFrame]) -> None:
    """Name the depths: embed, blocks by number, norm where all lines end at the same depth."""
    (axes,) = figure.axes
    deepest = {int(table["depth"].max()) for table in tables}
    layers = {int(d): str(n) for table in tables for d, n in zip(table["depth"], table["layer"], strict=True)}
    last = max(layers)
    step = max(1, round(last / TICKS))
    shown = [depth for depth in layers if depth % step == 0 and last - depth >= step] + [last]
    if len(deepest) > 1:
        labels = ["embed" if depth == 0 else str(depth) for depth in shown]
    else:
        labels = [layers[depth].removeprefix("block ") for depth in shown]
    axes.set_xticks(shown, labels)
    axes.set_xlabel("depth" if len(deepest) > 1 else "block")
