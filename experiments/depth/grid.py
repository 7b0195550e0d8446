"""Learning rate against depth, and against width: `python experiments/depth/grid.py`.

It reads results.csv and results-widths.csv; the width 48 is that of results.csv, at 6 blocks. Of each it prints two
tables in Markdown, all rates and the change to the greatest size at the best ones, and draws depths.png and widths.png.
A run has stalled when it ends with less than half of the test images right, and is lost when it failed or its loss
ended without a number. A spike is a record of the training loss, all terms together, above three times the median of
the 20 before it.
"""

import sys
from pathlib import Path

import pandas as pd

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, legend, line_styles, new_figure, render
from pdvit.plots.sweep import MINUS, NOTHING, estimate, paired

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from effects import CONTROLS, difference, markdown, rows_of, written  # noqa: E402
from tables import RATE  # noqa: E402

VARIANTS = (*CONTROLS, "paper")
STALLED = 0.5
HEIGHT = 2.0  # of a row of panels, in inches
WIDTH = 48  # of cpu.toml
ACCURACY, P, RANK = "accuracy, %", "P after the norm", "effective rank, %"


def grids() -> dict[str, pd.DataFrame]:
    """Return the runs for each figure: those of all depths, and those of all widths at the least depth."""
    depths = pd.read_csv(HERE / "results.csv")
    least = depths[depths["model.depth"] == depths["model.depth"].min()].assign(**{"model.width": WIDTH})
    return {"depths": depths, "widths": pd.concat([least, pd.read_csv(HERE / "results-widths.csv")], ignore_index=True)}


def axis_of(runs: pd.DataFrame) -> str:
    """Return what is crossed with the learning rate."""
    return "model.width" if "model.width" in runs else "model.depth"


def table_of(runs: pd.DataFrame) -> list[list[str]]:
    """Return the table in words: accuracy of each variant, paired differences, and how many runs went wrong."""
    axis = axis_of(runs)
    differences = [f"{VARIANTS[-1]} {MINUS} {control}" for control in CONTROLS]
    heads = [f"{count}: {', '.join(VARIANTS)}" for count in ("n", "stalled", "lost", "spikes")]
    table = [[axis.partition(".")[2], "rate", *(f"{name}, %" for name in VARIANTS), *differences, *heads]]
    for (size, rate), cells in runs.groupby([axis, RATE]):
        rows = {row.variant: row for row in rows_of(cells.drop(columns=RATE))}
        values = [list(rows[name].values("accuracy").values()) for name in VARIANTS]
        seen = map(estimate, values)
        told = [f"{accuracy.mean:.1f} ± {accuracy.std:.1f}" if accuracy.n else NOTHING for accuracy in seen]
        told += [difference(rows[VARIANTS[-1]], rows[control], "accuracy") for control in CONTROLS]
        counts = [[len(found) for found in values], *wrong(cells)]
        told += [", ".join(map(str, count)) for count in counts]
        table.append([str(size), f"{rate:g}", *told])
    return table


def wrong(cells: pd.DataFrame) -> list[list[int]]:
    """Count for each variant the runs that stalled, that are lost, and that had a spike."""
    lost = (cells["status"] == "failed") | cells["loss"].isna()
    marks = (~lost & (cells["accuracy"] < STALLED), lost, cells["loss_spikes"] > 0)
    return [[int(mark[cells["variant"] == name].sum()) for name in VARIANTS] for mark in marks]


def changes_of(runs: pd.DataFrame) -> list[list[str]]:
    """Return the change from the least size to the greatest, at the best rates: of each variant, and of the gains."""
    axis, rows = axis_of(runs), list(rows_of(runs))
    sizes = (runs[axis].min(), runs[axis].max())
    table = [[f"{axis.partition('.')[2]} {sizes[1]} {MINUS} {sizes[0]}", "n", "accuracy, points", P, RANK]]
    found = {(row.variant, row.where[axis]): row for row in rows}
    for variant in VARIANTS:
        small, large = (found[variant, size] for size in sizes)
        changes = [difference(large, small, column) for column in ("accuracy", "similarity_norm", "rank_norm")]
        table.append([variant, str(len(large.values("accuracy"))), *changes])
    for control in CONTROLS:
        gains = []
        for size in sizes:
            with_terms, without = (found[name, size].values("accuracy") for name in (VARIANTS[-1], control))
            gains.append({seed: value - without[seed] for seed, value in with_terms.items() if seed in without})
        change = paired(*gains)
        table.append([f"{VARIANTS[-1]} {MINUS} {control}", str(change.n), written(change, 1), NOTHING, NOTHING])
    return table


def draw(runs: pd.DataFrame) -> Drawing:
    """Draw accuracy, and below it P after the norm, by learning rate: a panel for each size, a dot for each seed."""
    axis = axis_of(runs)
    sizes = sorted(runs[axis].unique())
    styles = dict(zip(VARIANTS, [look | {"linestyle": "-"} for look in line_styles(len(VARIANTS), LIGHT)], strict=True))
    rows = (("accuracy", ACCURACY, 100), ("similarity_norm", P, 1))
    with new_figure(runs, DOUBLE, HEIGHT * len(rows), LIGHT) as figure:
        figure.subplots(len(rows), len(sizes), squeeze=False, sharex=True, sharey="row")
        for number, axes in enumerate(figure.axes):
            row, place = divmod(number, len(sizes))
            column, label, factor = rows[row]
            for variant, look in styles.items():
                cells = runs[(runs[axis] == sizes[place]) & (runs["variant"] == variant)].dropna(subset=column)
                means = cells.groupby(RATE)[column].mean() * factor
                axes.plot(means.index, means, **look)
                seeds = {"color": look["color"], "marker": ".", "markersize": 3, "alpha": 0.5, "linestyle": ""}
                axes.plot(cells[RATE], cells[column] * factor, **seeds)
            axes.set_xscale("log")
            axes.set_xticks(sorted(runs[RATE].unique()), [f"{rate:g}" for rate in sorted(runs[RATE].unique())])
            axes.minorticks_off()
            axes.set_title("" if row else f"{axis.partition('.')[2]} {sizes[place]}")
            axes.set_ylabel("" if place else label)
            axes.set_xlabel("learning rate" if row else "")
            if not row:
                axes.axhline(STALLED * factor, color=LIGHT.muted, linewidth=0.8, linestyle=":")
        legend(figure, styles, [])
        return figure


def report(name: str, part: str = "rates") -> str:
    """Return a table of depths or widths: of all `rates`, or of the `change` to the greatest size."""
    return markdown({"rates": table_of, "change": changes_of}[part](grids()[name]))


def main() -> None:
    for name, runs in grids().items():
        print(report(name), report(name, "change"), sep="\n")
        (HERE / f"{name}.png").write_bytes(render(draw(runs), ".png"))


if __name__ == "__main__":
    main()
