"""What the terms do in each experiment, against both controls: `python experiments/effects.py [FILE]`.

    python experiments/effects.py                         # all questions: effects.csv and effects.png
    python experiments/effects.py ablation/results.csv    # one table of results: all its variants

Both print a table in Markdown. Where learning rates were crossed, each variant has the one with the best mean on
validation. Differences are paired by seed, with their 95 % interval (Student's t).
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D
from tables import RATE, SEED, best_rates, write_table

from pdvit.plots.statistics import Difference, mean_and_std, paired
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, render, styled

HERE = Path(__file__).parent
CONTROLS = ("none", "cutmix")
ROW, AROUND = 0.24, 0.9  # height of a row of the figure and of what is around, in inches
MINUS, NOTHING = "\u2212", "\u2013"


@dataclass(frozen=True)
class Measure:
    """A number that is compared: its name, the columns that may have it with their headings (the first that is there),
    its unit and digits."""

    name: str
    columns: Mapping[str, str]
    factor: int
    digits: int


MEASURES = (
    Measure("accuracy or mIoU", {"miou": "mIoU, %", "accuracy": "accuracy, %"}, 100, 1),
    Measure("P", {"similarity_norm": "P behind the norm", "similarity_last": "P of last"}, 1, 2),
    Measure("effective rank", {"rank_norm": "effective rank there"}, 1, 1),
)


@dataclass(frozen=True)
class Row:
    """A variant in one setting: its rate, and for each measure the value of each seed."""

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
    *(Question("which term", f"digits, {term}", "ablation/results.csv", term) for term in TERMS),
    Question("photographs", "Tiny ImageNet-50", "segmentation/results-backbones.csv"),
    Question("segmentation", "CamVid, frozen", "segmentation/results-camvid-frozen.csv"),
    Question("segmentation", "CamVid, finetuned", "segmentation/results-camvid-finetuned.csv"),
)


def rows_of(results: pd.DataFrame) -> Iterator[Row]:
    """Yield each variant in each setting, at the rate that is best on validation."""
    dotted = [name for name in results if "." in name and name not in (RATE, SEED)]
    crossed = [name for name in dotted if results.groupby("variant")[name].nunique().max() > 1]
    for (*setting, variant), cells in results.groupby([*crossed, "variant"], sort=False):
        chosen, rate = cells[cells["status"] == "finished"], math.nan
        if RATE in cells:
            ((rate, *_),) = best_rates(cells.to_dict("records")).values()
            chosen = chosen[chosen[RATE] == rate]
        values = [seeds_of(chosen, measure.columns) for measure in MEASURES]
        yield Row(dict(zip(crossed, setting, strict=True)), variant, rate, values)


def seeds_of(cells: pd.DataFrame, columns: Iterable[str]) -> dict[str, float]:
    """Return the value of each seed, of the first column that is there."""
    for column in columns:
        if column in cells:
            known = cells[[SEED, column]].dropna()
            return dict(zip(known[SEED].astype(str), known[column], strict=True))
    return {}


def control_of(row: Row, name: str, rows: Sequence[Row]) -> Row | None:
    """Return the control that is alike otherwise; that of `probe-paper` is `probe-none`, where there is one."""
    alike = {other.variant: other for other in rows if other.where == row.where}
    families = [other.removesuffix("none") for other in alike if other.endswith("-none")]
    family = next((family for family in families if row.variant.startswith(family)), "")
    control = alike.get(f"{family}{name}")
    return None if control is row else control


def effect(row: Row, control: Row | None, measure: int) -> Difference | None:
    """Return row minus control in the measure's unit, or None where either lacks it."""
    if control is None:
        return None
    first, second = control.values[measure], row.values[measure]
    factor = MEASURES[measure].factor
    found = paired({seed: value * factor for seed, value in first.items()}, {s: v * factor for s, v in second.items()})
    return found if found.pairs else None


def written(effect: Difference | None, digits: int) -> str:
    """Return a difference and its interval as text."""
    if effect is None:
        return NOTHING
    mean, low, high = (f"{value:+.{digits}f}".replace("-", MINUS) for value in (effect.mean, effect.low, effect.high))
    return mean if math.isnan(effect.low) else f"{mean} [{low}, {high}]"


def table_of(results: pd.DataFrame) -> list[list[str]]:
    """Return the table of one experiment in words, headings first."""
    rows = list(rows_of(results))
    where = [name.rpartition(".")[2] for name in rows[0].where]
    rates = ["rate"] * (RATE in results)  # where a variant brings its own, the recipe has it
    table = [[*where, "", *rates, "n"]]
    for number, measure in enumerate(MEASURES):
        if any(row.values[number] for row in rows):
            heading = next(heading for column, heading in measure.columns.items() if column in results)
            table[0] += [heading, f"{MINUS} none", f"{MINUS} cutmix"][: 3 if number == 0 else 2]
    for row in rows:
        line = [*map(str, row.where.values()), row.variant, *(f"{row.rate:g}" for _ in rates), str(len(row.values[0]))]
        for number, measure in enumerate(MEASURES):
            if any(other.values[number] for other in rows):
                mean, std = mean_and_std([value * measure.factor for value in row.values[number].values()])
                line.append(f"{mean:.{measure.digits}f} ± {std:.{measure.digits}f}")
                for name in CONTROLS[: 2 if number == 0 else 1]:
                    line.append(written(effect(row, control_of(row, name, rows), number), measure.digits))
        table.append(line)
    return table


def effects() -> pd.DataFrame:
    """Return the effect for each question, on each measure, against each control."""
    found = []
    for asked in QUESTIONS:
        rows = list(rows_of(pd.read_csv(HERE / asked.file)))
        (row,) = [row for row in rows if row.variant == asked.variant and row.where == (asked.where or {})]
        for number, measure in enumerate(MEASURES):
            for name in CONTROLS:
                seen = effect(row, control_of(row, name, rows), number)
                if seen is not None:
                    line = {
                        "question": asked.question,
                        "setting": asked.setting,
                        "measure": measure.name,
                        "minus": name,
                    }
                    found.append(line | {"n": seen.pairs, "effect": seen.mean, "low": seen.low, "high": seen.high})
    return pd.DataFrame(found)


def summary_of(table: pd.DataFrame) -> list[list[str]]:
    """Return the table of all questions in words: the first measure against both controls, the others against none."""
    first, *others = MEASURES
    columns = [(first, control) for control in CONTROLS] + [(measure, CONTROLS[0]) for measure in others]
    summary = [["question", "setting", "n", *(f"{measure.name} {MINUS} {control}" for measure, control in columns)]]
    before = ""
    for (question, setting), part in table.groupby(["question", "setting"], sort=False):
        line = [str(question) if question != before else "", str(setting), str(part["n"].iloc[0])]
        for measure, control in columns:
            seen = part[(part["measure"] == measure.name) & (part["minus"] == control)]
            found = [Difference(row.effect, row.low, row.high, row.n) for row in seen.itertuples()]
            line.append(written(found[0] if found else None, measure.digits))
        summary.append(line)
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
    with styled(DOUBLE, ROW * len(settings) + AROUND, theme, columns=len(MEASURES), sharey=True) as figure:
        figure.data = table
        looks = dict(
            zip(
                CONTROLS,
                ({"color": theme.colours[0], "fmt": "o"}, {"color": theme.colours[1], "fmt": "s"}),
                strict=True,
            )
        )
        for axes, measure in zip(figure.axes, MEASURES, strict=True):
            axes.axvline(0, color=theme.muted, linewidth=0.8)
            for line in table[table["measure"] == measure.name].itertuples():
                place = settings.index((line.question, line.setting)) + (0.15 if line.minus == CONTROLS[1] else -0.15)
                reach = [[line.effect - line.low], [line.high - line.effect]]
                axes.errorbar([line.effect], [place], xerr=reach, markersize=3.5, elinewidth=1, **looks[line.minus])
            for place in range(1, len(settings)):
                if settings[place][0] != settings[place - 1][0]:
                    axes.axhline(place - 0.5, color=theme.muted, linewidth=0.4)
            axes.set_xlabel(measure.name + (", points" if measure.factor == 100 else ""))
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.tick_params(axis="y", length=0)
        figure.axes[0].set_yticks(range(len(settings)), [setting for _, setting in settings])
        figure.axes[0].set_ylim(len(settings) - 0.4, -0.6)
        keys = [
            Line2D([], [], color=look["color"], marker=look["fmt"], linestyle="", label=f"minus {name}")
            for name, look in looks.items()
        ]
        figure.legend(handles=keys, loc="outside upper left", ncols=2, borderaxespad=0.2)
        return figure


def main() -> None:
    if len(sys.argv) > 1:
        print(markdown(table_of(pd.read_csv(HERE / sys.argv[1]))), end="")
        return
    table = effects()
    write_table(HERE / "effects.csv", table.to_dict("records"))
    print(markdown(summary_of(table)), end="")
    (HERE / "effects.png").write_bytes(render(draw(table), ".png"))


if __name__ == "__main__":
    main()
