"""Accuracy and P over the epochs, and the gap to plain training: `python experiments/lasting/curves.py [SWEEP]`.

SWEEP is ten (by default), complete or deep. Of each finished cell of runs/lasting-SWEEP it takes the evaluations on
validation: accuracy, and P after the final norm on 64 images. It writes curves.csv (curves-SWEEP.csv of the others), a
row for each evaluation, and draws curves.png. It prints a table in Markdown: the difference in accuracy from `none`,
paired by seed, with its 95 % interval (Student's t), and the last epoch at which the interval excludes 0.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from effects import CONTROLS, NOTHING, markdown, written  # noqa: E402
from tables import SEED, Row, cells_of, write_table  # noqa: E402

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, legend, line_styles, new_figure, render  # noqa: E402
from pdvit.plots.sweep import Estimate, estimate, paired  # noqa: E402

BASELINE, ROWS = CONTROLS[0], 6  # epochs that the table shows
HEIGHT = 2.6  # of the figure, in inches


def evaluations(sweep: Path) -> Iterator[Row]:
    """Yield epoch, accuracy and P of each evaluation of each finished cell."""
    for cell in cells_of(sweep):
        if cell["status"] == "finished":
            of_cell = {"variant": cell["variant"], SEED: cell[SEED]}
            found: dict[float, Row] = {}
            for line in (sweep / cell["name"] / "metrics.jsonl").read_text().splitlines():
                record = json.loads(line)
                row = found.setdefault(record["epoch"], of_cell | {"epoch": record["epoch"]})
                if record["kind"] == "eval":
                    row |= {"accuracy": record["accuracy"]}
                elif record["kind"] == "similarity":
                    row |= {"similarity": record["similarity"][-1]}
            yield from (row for row in found.values() if {"accuracy", "similarity"} <= {*row})


def values(curves: pd.DataFrame, variant: str, epoch: float, column: str) -> dict[str, float]:
    """Return the value of each seed of a variant at an epoch."""
    rows = curves[(curves["variant"] == variant) & (curves["epoch"] == epoch)]
    return dict(zip(rows[SEED].astype(str), rows[column], strict=True))


def gap(curves: pd.DataFrame, variant: str, epoch: float) -> Estimate:
    """Estimate the difference in accuracy from the baseline at an epoch, in points, over the seeds of both."""
    pair = (values(curves, name, epoch, "accuracy") for name in (BASELINE, variant))
    first, second = ({seed: 100 * value for seed, value in one.items()} for one in pair)
    return paired(first, second)


def table_of(curves: pd.DataFrame) -> list[list[str]]:
    """Return the table in words, headings first: epochs, then the last one at which the gap is resolved."""
    epochs = sorted(curves["epoch"].unique())
    others = [name for name in curves["variant"].unique() if name != BASELINE]
    table = [["epoch", f"{BASELINE}, %", *(f"{name} \u2212 {BASELINE}" for name in others)]]
    table[0] += [f"P of {name}" for name in (BASELINE, *others)]
    step = -(-len(epochs) // ROWS)
    for epoch in reversed(epochs[::-1][::step]):
        line = [f"{epoch:g}", f"{100 * estimate([*values(curves, BASELINE, epoch, 'accuracy').values()]).mean:.1f}"]
        line += [written(gap(curves, name, epoch), 1) for name in others]
        for name in (BASELINE, *others):
            line.append(f"{estimate([*values(curves, name, epoch, 'similarity').values()]).mean:.2f}")
        table.append(line)
    last = ["last resolved", NOTHING]
    for name in others:
        gaps = {epoch: gap(curves, name, epoch) for epoch in epochs}
        resolved = [epoch for epoch, found in gaps.items() if found.low > 0 or found.high < 0]
        last.append(f"{max(resolved):g}" if resolved else NOTHING)
    return [*table, last + [NOTHING] * (len(others) + 1)]


def draw(curves: pd.DataFrame) -> Drawing:
    """Draw accuracy, its difference from the baseline and P over the epochs, with 95 % intervals over seeds."""
    names = list(curves["variant"].unique())
    styles = dict(zip(names, line_styles(len(names), LIGHT), strict=True))
    rows: list[Row] = []
    for (name, epoch), part in curves.groupby(["variant", "epoch"], sort=False):
        shown = {"accuracy, %": estimate([*(100 * part["accuracy"])]), "P": estimate([*part["similarity"]])}
        if name != BASELINE:
            shown |= {f"accuracy \u2212 {BASELINE}, points": gap(curves, name, epoch)}
        for measure, found in shown.items():
            place = {"measure": measure, "variant": name, "epoch": epoch}
            rows.append(place | {"n": found.n, "mean": found.mean, "low": found.low, "high": found.high})
    table = pd.DataFrame(rows)
    with new_figure(table, DOUBLE, HEIGHT, LIGHT) as figure:
        figure.subplots(1, 3, sharex=True)
        measures = ["accuracy, %", f"accuracy \u2212 {BASELINE}, points", "P"]
        for axes, measure in zip(figure.axes, measures, strict=True):
            draw_lines(axes, table[table["measure"] == measure], styles)
            axes.set(xlabel="epoch", ylabel=measure)
        figure.axes[1].axhline(0, color=LIGHT.muted, linewidth=0.8)
        legend(figure, styles)
        return figure


def draw_lines(axes: Axes, rows: pd.DataFrame, styles: dict[str, dict[str, object]]) -> None:
    for name, line in rows.groupby("variant", sort=False):
        look = styles[str(name)] | {"marker": ""}
        axes.plot(line["epoch"], line["mean"], **look)
        axes.fill_between(line["epoch"], line["low"], line["high"], color=look["color"], alpha=0.15, linewidth=0)


def main(words: Sequence[str]) -> None:
    """Write the table and the figure of a sweep, and print what the page shows."""
    kind = words[0] if words else "ten"
    end = "" if kind == "ten" else f"-{kind}"
    write_table(HERE / f"curves{end}.csv", list(evaluations(Path("runs") / f"lasting-{kind}")))
    curves = pd.read_csv(HERE / f"curves{end}.csv")
    (HERE / f"curves{end}.png").write_bytes(render(draw(curves), ".png"))
    print(markdown(table_of(curves)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
