"""What the terms do in each experiment, against both controls: `python experiments/effects.py [WORDS]`.

    python experiments/effects.py                                              # draws effects.png: every question
    python experiments/effects.py depth                                        # the rows of one question
    python experiments/effects.py ablation/results.csv                         # all variants of one table
    python experiments/effects.py ablation/results.csv ablation/effects.png    # draws their effects too
    python experiments/effects.py ablation/results.csv cosine accuracy         # a mean over seeds
    python experiments/effects.py ablation/results.csv cosine accuracy none    # a difference
    python experiments/effects.py depth/results.csv paper accuracy none model.depth=24    # ... of some of the runs

Tables are in Markdown. Where learning rates were crossed, each variant has the one with the best mean on validation.
Differences are paired by seed, with their 95 % interval (Student's t).
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tables import RATE, SEED, best_rates

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, legend, new_figure, render
from pdvit.plots.sweep import MINUS, NOTHING, Estimate, estimate, paired

HERE = Path(__file__).parent
CONTROLS = ("none", "cutmix")
ROW, AROUND = 0.21, 0.9  # height of a row of the figure and of what is around, in inches


class Measure(NamedTuple):
    """How a column is written: its heading, factor and digits; of a relative one, differences are in percent."""

    heading: str
    factor: int
    digits: int
    relative: bool = False


MEASURES = defaultdict(lambda: Measure("", 1, 2))  # by column; these are in the tables, if the results have them
MEASURES |= {
    "miou": Measure("mIoU, %", 100, 1),
    "accuracy": Measure("accuracy, %", 100, 1),
    "accuracy_val": Measure("accuracy on validation, %", 100, 1),
    "similarity_norm": Measure("P after the norm", 1, 2),
    "similarity_last": Measure("P of last", 1, 2),
    "rank_norm": Measure("effective rank there", 1, 1, relative=True),  # networks of several sizes are compared
}
# The panels of the figure: of each the first column that there is.
PANELS = {
    "accuracy or mIoU, points": ("miou", "accuracy"),
    "P": ("similarity_norm", "similarity_last"),
    "effective rank, %": ("rank_norm",),
}


@dataclass(frozen=True)
class Row:
    """A variant in one setting: its rate and its finished runs at that rate."""

    where: Mapping[str, object]
    variant: str
    rate: float
    runs: pd.DataFrame

    def values(self, column: str) -> dict[str, float]:
        """Return the value of each seed, in the unit of the tables."""
        known = self.runs.reindex(columns=[SEED, column]).dropna()
        return dict(zip(known[SEED].astype(str), known[column] * MEASURES[column].factor, strict=True))


class Question(NamedTuple):
    """A variant in one setting of a table of results."""

    section: str
    setting: str
    table: str  # the words of `read`
    variant: str


BOTH, PLAIN = ("cosine", "paper"), ("cosine-plain", "paper")
QUESTIONS = [
    Question(section, f"{setting}, {variant}", table, variant)
    for section, setting, table, variants in (
        ("published", "published ViT-S, CamVid, linear head", "published/results-mend-linear.csv", BOTH),
        ("published", "published ViT-S, CamVid, UPerNet", "published/results-mend-upernet.csv", BOTH),
        ("published", "published ViT-S, pets", "published/results-mend-pets.csv", BOTH),
        ("lasting", "CIFAR-100, 10 classes, 60 epochs", "lasting/results-ten.csv", BOTH),
        ("lasting", "CIFAR-100, 10 classes, 24 blocks", "lasting/results-deep.csv", BOTH),
        ("lasting", "CIFAR-100, 100 classes, 30 epochs", "lasting/results-complete.csv", BOTH),
        ("lasting", "digits, 12 blocks, 40 epochs", "ablation/results-long.csv", BOTH),
        ("weights", "CIFAR-100, 10 classes", "weights/results-best.csv", ("cosine-plain-1", "cosine-plain-3", "paper")),
        ("prevention", "pets from distinct patches", "prevention/results-pets.csv", ("cosine", "gram-10", "both-10")),
        ("prevention", "CamVid from distinct patches", "prevention/results-camvid.csv", ("cosine", "gram", "gram-10")),
        ("terms", "digits, 12 blocks", "ablation/results.csv", ("cosine", "contrastive", "mixing", "paper")),
        ("terms", "CIFAR-100, 10 classes", "ablation/results-photos.csv", ("cosine", "mixing", "paper")),
        ("terms", "Tiny ImageNet-50", "segmentation/results-backbones.csv", ("paper",)),
        ("depth", "digits, 6 blocks", "depth/results.csv model.depth=6", ("paper",)),
        ("depth", "digits, 24 blocks", "depth/results.csv model.depth=24", ("paper",)),
        ("depth", "digits, 6 blocks, 96 wide", "depth/results-widths.csv", ("paper",)),
        ("remedies", "digits", "remedies/results.csv", ("layerscale-paper", "registers-paper", "talking-heads-paper")),
        ("transfer", "digits 5 to 9", "transfer/results.csv", ("probe-cosine", "probe-paper")),
        ("transfer", "digits 5 to 9", "transfer/results.csv", ("finetuned-cosine", "finetuned-paper")),
        *(
            ("segmentation", f"{images}, {part}", f"segmentation/results-{file}-{part}.csv", variants)
            for images, file, variants in (("CamVid", "camvid", ("paper",)), ("digit scenes", "scenes", PLAIN))
            for part in ("frozen", "finetuned")
        ),
        ("digits", "digits, 8 blocks, 64 patches", "digits/results.csv", PLAIN),
    )
    for variant in variants
]


@cache
def read(file: str, *only: str) -> pd.DataFrame:
    """Read a table of this folder, or the rows of it that have some values, as KEY=VALUE."""
    table = pd.read_csv(HERE / file)
    for key, _, value in (part.partition("=") for part in only):
        table = table[table[key].astype(str) == value]
    return table


def rows_of(results: pd.DataFrame) -> Iterator[Row]:
    """Yield each variant in each setting, at the rate that is best on validation."""
    dotted = [name for name in results if "." in name and name not in (RATE, SEED)]
    crossed = [name for name in dotted if results.groupby("variant")[name].nunique().max() > 1]
    for (*setting, variant), cells in results.groupby([*crossed, "variant"], sort=False):
        chosen, rate = cells[cells["status"] == "finished"] if "status" in cells else cells, math.nan
        if RATE in cells:
            rate = next((rate for rate, *_ in best_rates(cells.to_dict("records")).values()), math.nan)
            chosen = chosen[chosen[RATE] == rate]
        yield Row(dict(zip(crossed, setting, strict=True)), variant, rate, chosen)


def at_best_rates(table: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Keep of each variant in each setting the runs at its best rate, without the column of rates.

    Args:
        table: a row or more for each run; where rates were not crossed it is returned as it is.
        results: of the same runs.
    """
    if RATE not in results:
        return table
    best = pd.concat(row.runs for row in rows_of(results))
    return table.merge(best[[name for name in table if name == "variant" or "." in name]]).drop(columns=RATE)


def row_of(rows: Sequence[Row], variant: str) -> Row:
    """Return the row of a variant. Raises ValueError if there is none, or one for each of several settings."""
    found = [row for row in rows if row.variant == variant]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} rows of {variant}; there are {', '.join(sorted({row.variant for row in rows}))}"
        )
    return found[0]


def control_of(row: Row, name: str, rows: Sequence[Row]) -> Row | None:
    """Return the control that is alike otherwise; that of `probe-paper` is `probe-none`, where there is one."""
    alike = {other.variant: other for other in rows if other.where == row.where}
    families = [other.removesuffix("none") for other in alike if other.endswith("-none")]
    family = next((family for family in families if row.variant.startswith(family)), "")
    control = alike.get(f"{family}{name}")
    return None if control is row else control


def effect(row: Row, control: Row | None, column: str) -> Estimate | None:
    """Return row minus control, of a relative measure in percent of the control; None where either lacks it."""
    if control is None:
        return None
    first, second = control.values(column), row.values(column)
    if MEASURES[column].relative:
        second = {seed: 100 * (value / first[seed] - 1) for seed, value in second.items() if seed in first}
        first = dict.fromkeys(first, 0.0)
    found = paired(first, second)
    return found if found.n else None


def written(effect: Estimate | None, digits: int) -> str:
    """Return a difference and its interval as text."""
    if effect is None:
        return NOTHING
    mean, low, high = (f"{value:+.{digits}f}".replace("-", MINUS) for value in (effect.mean, effect.low, effect.high))
    return mean if math.isnan(effect.low) else f"{mean} [{low}, {high}]"


def difference(row: Row, control: Row | None, column: str) -> str:
    """Return row minus control as text."""
    measure = MEASURES[column]
    return written(effect(row, control, column), 0 if measure.relative else measure.digits)


def mean_of(row: Row, column: str, *, spread: bool = False) -> str:
    """Return the mean over seeds as text, with the standard deviation if there are several."""
    found, digits = estimate(list(row.values(column).values())), MEASURES[column].digits
    return f"{found.mean:.{digits}f}" + f" ± {found.std:.{digits}f}" * (spread and found.n > 1) if found.n else NOTHING


def columns_of(results: pd.DataFrame) -> list[str | None]:
    """Return for each panel the column that the results have."""
    return [next((name for name in names if name in results), None) for names in PANELS.values()]


def table_of(results: pd.DataFrame) -> list[list[str]]:
    """Return the table of one experiment in words, headings first. A table without results has its own columns."""
    rows, columns = list(rows_of(results)), [column for column in columns_of(results) if column]
    rates = ["rate"] * (RATE in results)  # where a variant brings its own, the recipe has it
    controls = [name for name in CONTROLS if any(row.variant.endswith(name) for row in rows)]
    table = [[*(name.rpartition(".")[2] for name in rows[0].where), "", *rates, "n"]]
    if not columns:
        columns, controls = list(results.columns[2:]), []
    for measure in (MEASURES[column]._replace(heading=MEASURES[column].heading or column) for column in columns):
        table[0] += [measure.heading, *(f"{MINUS} {name}{', %' * measure.relative}" for name in controls)]
    for row in rows:
        seeds = str(len(row.values(columns[0])))
        line = [*map(str, row.where.values()), row.variant, *(f"{row.rate:g}" for _ in rates), seeds]
        for column in columns:
            line.append(mean_of(row, column, spread=True))
            line += [difference(row, control_of(row, name, rows), column) for name in controls]
        table.append(line)
    return table


def answer(asked: Question) -> tuple[Row, list[Row | None]]:
    """Return the row of a question, and its controls."""
    rows = list(rows_of(read(*asked.table.split())))
    row = row_of(rows, asked.variant)
    return row, [control_of(row, name, rows) for name in CONTROLS]


def summary_of(section: str) -> list[list[str]]:
    """Return the rows of a section in words: the first measure against both controls, the others against none."""
    table = [["setting", "n", "accuracy or mIoU of none, %", f"{MINUS} none, points", f"{MINUS} cutmix, points"]]
    table[0] += [f"P {MINUS} none", f"effective rank {MINUS} none, %"]
    for asked in (asked for asked in QUESTIONS if asked.section == section):
        row, (none, cutmix) = answer(asked)
        first, *others = columns_of(row.runs)
        line = [asked.setting, str(len(row.values(first))), mean_of(none, first)]
        line += [difference(row, none, first), difference(row, cutmix, first)]
        table.append(line + [difference(row, none, column) if column else NOTHING for column in others])
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *body))


def report(what: str, *words: str) -> str:
    """Return what is printed: the table of a section or a file, or of a file one number."""
    if what in {asked.section for asked in QUESTIONS}:
        return markdown(summary_of(what))
    only = [word for word in words if "=" in word]
    results = read(what, *only)
    if only == [*words]:
        return markdown(table_of(results))
    variant, column, *control = (word for word in words if "=" not in word)
    rows = list(rows_of(results))
    row = row_of(rows, variant)
    return difference(row, row_of(rows, *control), column) if control else mean_of(row, column)


def questions_of(file: str) -> Iterator[Question]:
    """Yield what one can ask of a table of results: each variant that is no control, in each setting."""
    rows = list(rows_of(read(file)))
    for row in rows:
        if all(control_of(row, name, rows) for name in CONTROLS):
            words = [file, *(f"{key}={value}" for key, value in row.where.items())]
            yield Question("", " ".join([*map(str, row.where.values()), row.variant]), " ".join(words), row.variant)


def draw(questions: Sequence[Question]) -> Drawing:
    """Draw a panel for each measure: a row for each question, the difference from each control with its interval."""
    looks = [{"color": colour, "marker": marker} for colour, marker in zip(LIGHT.colours, "os", strict=False)]
    with new_figure(pd.DataFrame(questions), DOUBLE, ROW * len(questions) + AROUND, LIGHT) as figure:
        figure.subplots(1, len(PANELS), sharey=True)
        for axes, measure in zip(figure.axes, PANELS, strict=True):
            axes.axvline(0, color=LIGHT.muted, linewidth=0.8)
            axes.set_xlabel(measure)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.tick_params(axis="y", length=0)
        for place, asked in enumerate(questions):
            row, controls = answer(asked)
            for axes, column in zip(figure.axes, columns_of(row.runs), strict=True):
                for control, look, shift in zip(controls, looks, (-0.15, 0.15), strict=True):
                    if column and (seen := effect(row, control, column)):
                        reach = [[seen.mean - seen.low], [seen.high - seen.mean]]
                        marks = {"markersize": 3.5, "elinewidth": 1, "linestyle": ""}
                        axes.errorbar([seen.mean], [place + shift], xerr=reach, **marks, **look)
                if place and asked.section != questions[place - 1].section:
                    axes.axhline(place - 0.5, color=LIGHT.muted, linewidth=0.4)
        figure.axes[0].set_yticks(range(len(questions)), [asked.setting for asked in questions])
        figure.axes[0].set_ylim(len(questions) - 0.4, -0.6)
        legend(figure, {f"minus {name}": look | {"linestyle": ""} for name, look in zip(CONTROLS, looks, strict=True)})
        return figure


def main() -> int:
    words = sys.argv[1:] or ["effects.png"]
    figure = words.pop() if words[-1].endswith(".png") else ""
    if words and words[0] not in {asked.section for asked in QUESTIONS} and not (HERE / words[0]).is_file():
        print(__doc__)
        return 2
    questions = list(questions_of(words[0])) if words and figure else QUESTIONS
    if not questions:
        print(f"{words[0]} has no variant beside both controls, {' and '.join(CONTROLS)}: nothing to draw")
        return 2
    if words:
        print(report(*words).rstrip("\n"))
    if figure:
        (HERE / figure).write_bytes(render(draw(questions), ".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
