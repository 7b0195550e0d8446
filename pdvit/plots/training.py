"""A run over time: the loss by term, accuracy or mIoU, and P of every layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pdvit.errors import UserError
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, line_styles, new_figure, shorten, thin_ticks

# Columns that each type of record needs.
NEEDED = {"train": {"epoch", "class"}, "eval": {"epoch", "accuracy"}, "similarity": {"epoch", "layers", "similarity"}}
TERMS = ("class", "aux", "cosine", "contrastive", "mixing", "koleo", "spectral")
SCORES = {"miou": "mIoU", "accuracy": "accuracy"}  # the first is drawn: evaluations of a segmentation have both
Records = dict[str, pd.DataFrame]  # by type


def read_records(run: Path) -> Records:
    """Read metrics.jsonl as one table per type of record. Raises UserError if it is damaged or has no evaluation."""
    file = run / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        tip = "name a run that was trained by pdvit"
        raise UserError(f"the run has no records that can be read: {error}", str(file), tip) from error
    records: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.setdefault(record["kind"], []).append(record)
        except (ValueError, LookupError, TypeError) as error:
            if number < len(lines):  # the last line may be incomplete while the run goes on
                raise UserError(f"line {number} is not a record", str(file), "the file is damaged") from error
    if not records:
        raise UserError("the file holds no records", str(file), "wait for the run's first steps, or restore the file")
    tables = {name: pd.DataFrame(rows) for name, rows in records.items()}
    for name, columns in NEEDED.items():
        if missing := sorted(columns - set(tables.get(name, pd.DataFrame()))):
            what = f"the run was not evaluated yet: it has no {name} records with '{missing[0]}'"
            raise UserError(what, str(file), "wait for its first evaluation")
    return tables


def plot_training(runs: Mapping[str, Records], theme: Theme = LIGHT) -> Drawing:
    """Draw one row per run: loss by term, validation accuracy or mIoU, and P over epoch and layer."""
    with new_figure(DOUBLE, 2.2 * len(runs), theme, rows=len(runs), columns=3) as figure:
        data = []
        for row, (name, records) in enumerate(runs.items()):
            loss, score, heat = figure.axes[3 * row : 3 * row + 3]
            train, evaluation, probe = (records[record] for record in NEEDED)
            terms = [term for term in TERMS if term in train]
            for term, style in zip(terms, line_styles(len(terms), theme), strict=True):
                loss.plot(train["epoch"], train[term], label=term, **{**style, "marker": ""})
            lowest = min(0.0, train[terms].min().min())  # KoLeo may be negative
            loss.set(
                title=f"{shorten(name, 18)}: loss by term", xlabel="epoch", ylabel="unweighted", ylim=(lowest, None)
            )
            loss.legend()
            key = next(key for key in SCORES if key in evaluation)
            score.plot(evaluation["epoch"], evaluation[key] * 100, marker=".", color=theme.ink)
            title = f"validation {SCORES[key]}, % (best {evaluation[key].max() * 100:.1f})"
            score.set(title=title, xlabel="epoch", ylim=(0, 100))
            _draw_probe(heat, probe)
            layers = probe[["epoch", "layers", "similarity"]].explode(["layers", "similarity"])
            rows = [
                train.melt("epoch", terms, "of", "value").assign(panel="loss"),
                evaluation[["epoch", key]].rename(columns={key: "value"}).assign(panel=SCORES[key]),
                layers.rename(columns={"layers": "of", "similarity": "value"}).assign(panel="P"),
            ]
            data.append(pd.concat(rows, ignore_index=True).assign(run=name))
        whole = pd.concat(data, ignore_index=True)
        figure.data = whole[["run", "panel", "of", "epoch", "value"]].astype({"value": float})
        return figure


def _draw_probe(axes: Axes, similarity: pd.DataFrame) -> None:
    """Draw P on the probe: epochs across, layers upwards, 0 to 1 in a map that is monotone in grey."""
    layers = similarity["layers"].iloc[-1]
    grid = pd.DataFrame(similarity["similarity"].tolist()).T
    edges = [0.0, *similarity["epoch"]]  # a column reaches from the evaluation before to its own
    heights = [layer - 0.5 for layer in range(len(layers) + 1)]
    image = axes.pcolormesh(edges, heights, grid, vmin=0, vmax=1, cmap="viridis")
    ticks = thin_ticks(len(layers), 8)
    axes.set_yticks(ticks, [layers[i].removeprefix("block ") for i in ticks])
    axes.set(title="P by layer on the probe", xlabel="epoch")
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label="P")
