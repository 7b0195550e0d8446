"""Accuracy and P by the weight of each term: `python experiments/weights/grid.py`.

It reads results-grid.csv and results-edge.csv. Each variant has the learning rate that is best on validation; accuracy
is that on validation, a mean over seeds. It prints a table in Markdown and draws grid.png.
"""

import re
import sys
from pathlib import Path

import pandas as pd

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, legend, line_styles, new_figure, render

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from effects import CONTROLS, markdown, mean_of, row_of, rows_of  # noqa: E402

FAMILIES = {
    "cosine": "cosine, mixed images",
    "cosine-plain": "cosine, plain images",
    "contrastive": "contrastive",
    "contrastive-unit": "contrastive, normalised",
    "mixing": "mixing",
}
PANELS = {"accuracy_val": ("accuracy on validation, %", 100), "similarity_norm": ("P after the norm", 1)}
HEIGHT = 2.6  # inches
TICKS = (0.1, 1, 10, 100)

RUNS = pd.concat([pd.read_csv(HERE / f"results-{part}.csv") for part in ("grid", "edge")])
ROWS = list(rows_of(RUNS))


def weights_of(family: str) -> list[tuple[float, str]]:
    """Return the weights of a term alone without a schedule, and the variants that have them."""
    pattern = re.compile(rf"{family}-([\d.]+)")
    found = [match for row in ROWS if (match := pattern.fullmatch(row.variant))]
    return sorted((float(match[1]), match[0]) for match in found)


def draw() -> Drawing:
    """Draw accuracy and P by weight: a line for each term alone, and the controls."""
    styles = dict(zip(FAMILIES.values(), line_styles(len(FAMILIES), LIGHT), strict=True))
    controls = dict(zip(CONTROLS, (":", "--"), strict=True))
    with new_figure(RUNS, DOUBLE, HEIGHT, LIGHT) as figure:
        figure.subplots(1, len(PANELS))
        for axes, (column, (label, factor)) in zip(figure.axes, PANELS.items(), strict=True):
            for family, name in FAMILIES.items():
                known = weights_of(family)
                means = [row_of(ROWS, variant).runs[column].mean() * factor for _, variant in known]
                axes.plot([weight for weight, _ in known], means, **styles[name])
            for control, line in controls.items():
                mean = row_of(ROWS, control).runs[column].mean() * factor
                axes.axhline(mean, color=LIGHT.muted, linewidth=0.8, linestyle=line)
            axes.set_xscale("log")
            axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.minorticks_off()
            axes.set(xlabel="weight", ylabel=label)
        lines = {name: {"color": LIGHT.muted, "linestyle": line} for name, line in controls.items()}
        legend(figure, styles | lines, [])
        return figure


def report() -> str:
    """Return the table of all variants, the best on validation first."""
    heads = ["variant", "rate", "n", "accuracy on validation, %", "P after the norm", "effective rank there"]
    table = [heads]
    for row in sorted(ROWS, key=lambda row: -row.runs["accuracy_val"].mean()):
        numbers = [mean_of(row, column) for column in ("accuracy_val", "similarity_norm", "rank_norm")]
        table.append([row.variant, f"{row.rate:g}", str(len(row.runs)), *numbers])
    return markdown(table)


if __name__ == "__main__":
    print(report(), end="")
    (HERE / "grid.png").write_bytes(render(draw(), ".png"))
