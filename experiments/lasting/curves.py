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

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from effects import CONTROLS, difference, effect, markdown, mean_of, rows_of  # noqa: E402
from figures import draw_means  # noqa: E402
from tables import SEED, Row, cells_of, write_table  # noqa: E402

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, legend, line_styles, new_figure, render  # noqa: E402
from pdvit.plots.sweep import MINUS, NOTHING, estimate  # noqa: E402

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


def table_of(curves: pd.DataFrame) -> list[list[str]]:
    """Return the table in words, headings first: epochs, then the last one at which the gap is resolved."""
    evaluations = {epoch: {row.variant: row for row in rows_of(rows)} for epoch, rows in curves.groupby("epoch")}
    names = [name for name in curves["variant"].unique() if name != BASELINE]
    table = [["epoch", f"{BASELINE}, %", *(f"{name} {MINUS} {BASELINE}" for name in names)]]
    table[0] += [f"P of {name}" for name in (BASELINE, *names)]
    step = -(-len(evaluations) // ROWS)
    for epoch in reversed([*evaluations][::-1][::step]):
        rows = evaluations[epoch]
        line = [f"{epoch:g}", mean_of(rows[BASELINE], "accuracy")]
        line += [difference(rows[name], rows[BASELINE], "accuracy") for name in names]
        table.append(line + [mean_of(rows[name], "similarity") for name in (BASELINE, *names)])
    last = ["last resolved", NOTHING]
    for name in names:
        gaps = {epoch: effect(rows[name], rows[BASELINE], "accuracy") for epoch, rows in evaluations.items()}
        resolved = [epoch for epoch, found in gaps.items() if found.low > 0 or found.high < 0]
        last.append(f"{max(resolved):g}" if resolved else NOTHING)
    return [*table, last + [NOTHING] * (len(names) + 1)]


def draw(curves: pd.DataFrame) -> Drawing:
    """Draw accuracy, its difference from the baseline and P over the epochs, with 95 % intervals over seeds."""
    names, gap = list(curves["variant"].unique()), f"accuracy {MINUS} {BASELINE}, points"
    styles = dict(zip(names, [look | {"marker": ""} for look in line_styles(len(names))], strict=True))
    found: list[Row] = []
    for epoch, part in curves.groupby("epoch", sort=False):
        rows = {row.variant: row for row in rows_of(part)}
        for name, row in rows.items():
            shown = {"accuracy, %": estimate([*row.values("accuracy").values()])}
            shown |= {gap: effect(row, rows[BASELINE], "accuracy")} if name != BASELINE else {}
            shown |= {"P": estimate([*row.values("similarity").values()])}
            place = {"variant": name, "epoch": epoch}
            found += [{"measure": measure} | place | seen._asdict() for measure, seen in shown.items()]
    table = pd.DataFrame(found)
    with new_figure(table, DOUBLE, HEIGHT, LIGHT) as figure:
        figure.subplots(1, 3, sharex=True)
        for axes, measure in zip(figure.axes, ("accuracy, %", gap, "P"), strict=True):
            draw_means(axes, table[table["measure"] == measure], "epoch", styles)
            axes.set(xlabel="epoch", ylabel=measure)
        figure.axes[1].axhline(0, color=LIGHT.muted, linewidth=0.8)
        legend(figure, styles)
        return figure


def report(name: str) -> str:
    """Return the table of curves.csv, or another of the name."""
    return markdown(table_of(pd.read_csv(HERE / name)))


def main(words: Sequence[str]) -> None:
    """Write the table and the figure of a sweep, and print what the page shows."""
    kind = words[0] if words else "ten"
    name = "curves" if kind == "ten" else f"curves-{kind}"
    write_table(HERE / f"{name}.csv", list(evaluations(Path("runs") / f"lasting-{kind}")))
    (HERE / f"{name}.png").write_bytes(render(draw(pd.read_csv(HERE / f"{name}.csv")), ".png"))
    print(report(f"{name}.csv"), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
