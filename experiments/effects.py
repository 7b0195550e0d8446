"""What the terms do in each experiment, against both controls: `python experiments/effects.py [FILE [FIGURE]]`.

    python experiments/effects.py                         # all questions: effects.csv and effects.png
    python experiments/effects.py ablation/results.csv    # one table of results: all its variants
    python experiments/effects.py ablation/results.csv ablation/effects.png    # draws their effects too

Both print a table in Markdown. Where learning rates were crossed, each variant has the one with the best mean on
validation. Differences are paired by seed, with their 95 % interval (Student's t).
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D
from tables import RATE, SEED, best_rates, write_table

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, new_figure, render
from pdvit.plots.sweep import Estimate, estimate, paired

HERE = Path(__file__).parent
CONTROLS = ("none", "cutmix")
ROW, AROUND = 0.24, 0.9  # height of a row of the figure and of what is around, in inches
MINUS, NOTHING = "\u2212", "\u2013"


@dataclass(frozen=True)
class Measure:
    """A number that is compared.

    Attributes:
        name: to read.
        columns: that may have it, with their headings; the first that is there.
        factor: from the column's unit to that of the table.
        digits: behind the point.
        relative: differences are percentages of the control, for what is compared between settings of another size.
    """

    name: str
    columns: Mapping[str, str]
    factor: int
    digits: int
    relative: bool = False


MEASURES = (
    Measure("accuracy or mIoU", {"miou": "mIoU, %", "accuracy": "accuracy, %"}, 100, 1),
    Measure("P", {"similarity_norm": "P after the norm", "similarity_last": "P of last"}, 1, 2),
    Measure("effective rank", {"rank_norm": "effective rank there"}, 1, 1, relative=True),
)


@dataclass(frozen=True)
class Row:
    """A variant in one setting: its rate, and for each measure the value of each seed, in the table's unit."""

    where: Mapping[str, object]
    variant: str
    rate: float
    values: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Question:
    """A variant in one setting of a table of results."""

    question: str
    setting: str
    file: str
    variant: str = "paper"
    where: Mapping[str, object] | None = None


TERMS = ("cosine", "contrastive", "mixing", "paper")
QUESTIONS = (
    Question("smoke test", "digits, 8 blocks, 64 patches", "digits/results.csv"),
    *(Question("which term", f"digits, 12 blocks, {term}", "ablation/results.csv", term) for term in TERMS),
    Question("longer training", "digits, 12 blocks, 40 epochs", "ablation/results-long.csv"),
    *(
        Question("longer training", f"CIFAR-100, 10 classes, 60 epochs, {term}", "lasting/results-ten.csv", term)
        for term in ("cosine", "paper")
    ),
    *(
        Question("depth", f"digits, {blocks} blocks", "depth/results.csv", where={"model.depth": blocks})
        for blocks in (6, 24)
    ),
    Question("width", "digits, 6 blocks, 96 wide", "depth/results-widths.csv"),
    *(
        Question("beside a remedy", f"digits, {name.replace('-', ' ')}", "remedies/results.csv", f"{name}-paper")
        for name in ("layerscale", "registers", "talking-heads")
    ),
    Question("transfer", "digits 0 to 4, then 5 to 9, frozen", "transfer/results.csv", "probe-paper"),
    Question("transfer", "digits 0 to 4, then 5 to 9, finetuned", "transfer/results.csv", "finetuned-paper"),
    *(
        Question("photographs", f"CIFAR-100, 10 classes, {term}", "ablation/results-photos.csv", term)
        for term in ("cosine", "mixing", "paper")
    ),
    Question("photographs", "Tiny ImageNet-50", "segmentation/results-backbones.csv"),
    Question("segmentation", "CamVid, frozen", "segmentation/results-camvid-frozen.csv"),
    Question("segmentation", "CamVid, finetuned", "segmentation/results-camvid-finetuned.csv"),
    Question("segmentation", "digit scenes, frozen", "segmentation/results-scenes-frozen.csv"),
    Question("segmentation", "digit scenes, finetuned", "segmentation/results-scenes-finetuned.csv"),
)


def rows_of(results: pd.DataFrame) -> Iterator[Row]:
    """Yield each variant in each setting, at the rate that is best on validation."""
    dotted = [name for name in results if "." in name and name not in (RATE, SEED)]
    crossed = [name for name in dotted if results.groupby("variant")[name].nunique().max() > 1]
    for (*setting, variant), cells in results.groupby([*crossed, "variant"], sort=False):
        chosen, rate = cells[cells["status"] == "finished"], math.nan
        if RATE in cells:
            rate = next((rate for rate, *_ in best_rates(cells.to_dict("records")).values()), math.nan)
            chosen = chosen[chosen[RATE] == rate]
        values = [seeds_of(chosen, measure) for measure in MEASURES]
        yield Row(dict(zip(crossed, setting, strict=True)), variant, rate, values)


def at_best_rates(table: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Keep of each variant in each setting the runs at its best rate, without the column of rates.

    Args:
        table: a row or more for each run; where rates were not crossed it is returned as it is.
        results: of the same runs.
    """
    if RATE not in results:
        return table
    parts = []
    for row in rows_of(results):
        kept = table[(table["variant"] == row.variant) & (table[RATE] == row.rate)]
        for name, value in row.where.items():
            kept = kept[kept[name] == value]
        parts.append(kept.drop(columns=RATE))
    return pd.concat(parts)


def seeds_of(cells: pd.DataFrame, measure: Measure) -> dict[str, float]:
    """Return the value of each seed, of the first column that is there."""
    for column in measure.columns:
        if column in cells:
            known = cells[[SEED, column]].dropna()
            return dict(zip(known[SEED].astype(str), known[column] * measure.factor, strict=True))
    return {}


def control_of(row: Row, name: str, rows: Sequence[Row]) -> Row | None:
    """Return the control that is alike otherwise; that of `probe-paper` is `probe-none`, where there is one."""
    alike = {other.variant: other for other in rows if other.where == row.where}
    families = [other.removesuffix("none") for other in alike if other.endswith("-none")]
    family = next((family for family in families if row.variant.startswith(family)), "")
    control = alike.get(f"{family}{name}")
    return None if control is row else control


def effect(row: Row, control: Row | None, measure: int) -> Estimate | None:
    """Return row minus control, of a relative measure in percent of the control; None where either lacks it."""
    if control is None:
        return None
    first, second = control.values[measure], row.values[measure]
    if MEASURES[measure].relative:
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


def table_of(results: pd.DataFrame) -> list[list[str]]:
    """Return the table of one experiment in words, headings first."""
    rows = list(rows_of(results))
    rates = ["rate"] * (RATE in results)  # where a variant brings its own, the recipe has it
    table = [[*(name.rpartition(".")[2] for name in rows[0].where), "", *rates, "n"]]
    shown = [number for number in range(len(MEASURES)) if any(row.values[number] for row in rows)]
    for measure in (MEASURES[number] for number in shown):
        heading = next(heading for column, heading in measure.columns.items() if column in results)
        table[0] += [heading, *(f"{MINUS} {name}{', %' * measure.relative}" for name in CONTROLS)]
    for row in rows:
        line = [*map(str, row.where.values()), row.variant, *(f"{row.rate:g}" for _ in rates), str(len(row.values[0]))]
        for number in shown:
            digits = MEASURES[number].digits
            found = estimate(list(row.values[number].values()))
            line.append(f"{found.mean:.{digits}f}" + f" ± {found.std:.{digits}f}" * (found.n > 1))
            digits *= not MEASURES[number].relative
            line += [written(effect(row, control_of(row, name, rows), number), digits) for name in CONTROLS]
        table.append(line)
    return table


def questions_of(file: str) -> list[Question]:
    """Return what one can ask of a table of results: each variant that is no control, in each setting."""
    rows = list(rows_of(pd.read_csv(HERE / file)))
    asked = [row for row in rows if all(control_of(row, name, rows) for name in CONTROLS)]
    names = [" ".join([*map(str, row.where.values()), row.variant]) for row in asked]
    return [Question("", name, file, row.variant, row.where) for name, row in zip(names, asked, strict=True)]


def effects(questions: Sequence[Question] = QUESTIONS) -> pd.DataFrame:
    """Return the effect for each question, on each measure, against each control, with the mean of that control."""
    found = []
    for asked in questions:
        rows = list(rows_of(pd.read_csv(HERE / asked.file)))
        (row,) = [row for row in rows if row.variant == asked.variant and row.where == (asked.where or {})]
        for number, measure in enumerate(MEASURES):
            for name in CONTROLS:
                control = control_of(row, name, rows)
                seen = effect(row, control, number)
                if control is not None and seen is not None:
                    line = {"question": asked.question, "setting": asked.setting, "measure": measure.name}
                    line |= {"minus": name, "control": estimate(list(control.values[number].values())).mean}
                    found.append(line | {"n": seen.n, "effect": seen.mean, "low": seen.low, "high": seen.high})
    return pd.DataFrame(found)


def summary_of(table: pd.DataFrame) -> list[list[str]]:
    """Return the table of all questions in words: the first measure against both controls, the others against none."""
    first, *others = MEASURES
    columns = [(first, control) for control in CONTROLS] + [(measure, CONTROLS[0]) for measure in others]
    heads = [f"{measure.name} {MINUS} {control}{', %' * measure.relative}" for measure, control in columns]
    summary, before = [["question", "setting", "n", f"{first.name} of {CONTROLS[0]}", *heads]], ""
    for (question, setting), part in table.groupby(["question", "setting"], sort=False):
        line = []
        for measure, control in columns:
            seen = part[(part["measure"] == measure.name) & (part["minus"] == control)]
            found = [Estimate(row.n, row.effect, math.nan, row.low, row.high) for row in seen.itertuples()]
            line.append(written(found[0] if found else None, 0 if measure.relative else measure.digits))
        base = part[(part["measure"] == first.name) & (part["minus"] == CONTROLS[0])].iloc[0]
        told = [
            str(question) * (question != before),
            str(setting),
            str(base["n"]),
            f"{base['control']:.{first.digits}f}",
        ]
        summary.append([*told, *line])
        before = str(question)
    return summary


def markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *body))


def draw(table: pd.DataFrame, theme: Theme = LIGHT) -> Drawing:
    """Draw a panel for each measure: a row for each setting, the difference from each control with its interval.

    Args:
        table: as `effects` returns it.
        theme: colours.
    """
    settings = list(dict.fromkeys(zip(table["question"], table["setting"], strict=True)))
    with new_figure(table, DOUBLE, ROW * len(settings) + AROUND, theme) as figure:
        figure.subplots(1, len(MEASURES), sharey=True)
        styles: dict[str, dict[str, str]] = {
            "none": {"color": theme.colours[0], "fmt": "o"},
            "cutmix": {"color": theme.colours[1], "fmt": "s"},
        }
        for axes, measure in zip(figure.axes, MEASURES, strict=True):
            axes.axvline(0, color=theme.muted, linewidth=0.8)
            for line in table[table["measure"] == measure.name].itertuples():
                place = settings.index((line.question, line.setting)) + (0.15 if line.minus == CONTROLS[1] else -0.15)
                reach = [[line.effect - line.low], [line.high - line.effect]]
                axes.errorbar([line.effect], [place], xerr=reach, markersize=3.5, elinewidth=1, **styles[line.minus])
            for place in range(1, len(settings)):
                if settings[place][0] != settings[place - 1][0]:
                    axes.axhline(place - 0.5, color=theme.muted, linewidth=0.4)
            axes.set_xlabel(measure.name + ", points" * (measure.factor == 100) + ", %" * measure.relative)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.tick_params(axis="y", length=0)
        figure.axes[0].set_yticks(range(len(settings)), [setting for _, setting in settings])
        figure.axes[0].set_ylim(len(settings) - 0.4, -0.6)
        keys = [
            Line2D([], [], color=style["color"], marker=style["fmt"], linestyle="", label=f"minus {name}")
            for name, style in styles.items()
        ]
        figure.legend(handles=keys, loc="outside upper left", ncols=2, borderaxespad=0.2)
        return figure


def main() -> int:
    if len(sys.argv) > 1:
        if not (HERE / sys.argv[1]).is_file() or not Path(sys.argv[1]).name.startswith("results"):
            print(__doc__)
            return 2
        file, *figure = sys.argv[1:]
        if figure and not questions_of(file):
            print(f"{file} has no variant beside both controls, {' and '.join(CONTROLS)}: nothing to draw")
            return 2
        print(markdown(table_of(pd.read_csv(HERE / file))), end="")
        for name in figure:
            (HERE / name).write_bytes(render(draw(effects(questions_of(file))), ".png"))
        return 0
    table = effects()
    write_table(HERE / "effects.csv", table.to_dict("records"))
    print(markdown(summary_of(pd.read_csv(HERE / "effects.csv"))), end="")  # rounded from what is written
    (HERE / "effects.png").write_bytes(render(draw(table), ".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
