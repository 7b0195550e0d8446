"""Learning rate against depth, and against width: `python experiments/depth/grid.py`.

It reads results.csv and results-widths.csv; the width 48 is that of results.csv, at 6 blocks. Of each it prints two
tables in Markdown, all rates and what the greatest size changes at the best ones, and draws depths.png and widths.png.
A run has stalled when it ends with less than half of the test images right, and is lost when it failed or its loss
ended without a number. A spike is a record of the training loss, all terms together, above three times the median of
the 20 before it.
"""

import sys
from pathlib import Path

import pandas as pd

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, legend, line_styles, new_figure, render
from pdvit.plots.sweep import estimate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from effects import CONTROLS, MEASURES, MINUS, NOTHING, effect, markdown, rows_of, written  # noqa: E402
from tables import RATE, SEED  # noqa: E402

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
    axis, digits = axis_of(runs), MEASURES[0].digits
    differences = [f"{VARIANTS[-1]} {MINUS} {control}" for control in CONTROLS]
    heads = [f"{count}: {', '.join(VARIANTS)}" for count in ("n", "stalled", "lost", "spikes")]
    table = [[axis.partition(".")[2], "rate", *(f"{name}, %" for name in VARIANTS), *differences, *heads]]
    for (size, rate), cells in runs.groupby([axis, RATE]):
        rows = {row.variant: row for row in rows_of(cells.drop(columns=RATE))}
        values = [list(rows[name].values[0].values()) for name in VARIANTS]
        seen = map(estimate, values)
        told = [f"{accuracy.mean:.1f} ± {accuracy.std:.1f}" if accuracy.n else NOTHING for accuracy in seen]
        told += [written(effect(rows[VARIANTS[-1]], rows[control], 0), digits) for control in CONTROLS]
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
    """Return what each variant gains or loses from the least size to the greatest, at its best rates on validation."""
    axis, rows = axis_of(runs), list(rows_of(runs))
    least, greatest = runs[axis].min(), runs[axis].max()
    table = [[f"{axis.partition('.')[2]} {greatest} {MINUS} {least}", "n", "accuracy, points", P, RANK]]
    for variant in VARIANTS:
        small, large = (
            next(row for row in rows if row.variant == variant and row.where[axis] == size)
            for size in (least, greatest)
        )
        found = [effect(large, small, number) for number in range(len(MEASURES))]
        digits = [0 if measure.relative else measure.digits for measure in MEASURES]
        seeds = str(max(seen.n if seen else 0 for seen in found))
        table.append([variant, seeds, *map(written, found, digits)])
    return table


def draw(runs: pd.DataFrame, theme: Theme = LIGHT) -> Drawing:
    """Draw accuracy, and below it P after the norm, by learning rate: a panel for each size, a dot for each seed."""
    axis = axis_of(runs)
    sizes = sorted(runs[axis].unique())
    styles = dict(zip(VARIANTS, [look | {"linestyle": "-"} for look in line_styles(len(VARIANTS), theme)], strict=True))
    rows = (("accuracy", ACCURACY, MEASURES[0].factor), ("similarity_norm", P, 1))
    data = runs[[axis, RATE, "variant", SEED, *(column for column, *_ in rows)]]
    with new_figure(data, DOUBLE, HEIGHT * len(rows), theme) as figure:
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
                axes.axhline(STALLED * factor, color=theme.muted, linewidth=0.8, linestyle=":")
        legend(figure, styles, [])
        return figure


def main() -> None:
    for name, runs in grids().items():
        print(markdown(table_of(runs)))
        print(markdown(changes_of(runs)))
        (HERE / f"{name}.png").write_bytes(render(draw(runs), ".png"))


if __name__ == "__main__":
    main()
