"""A run over time: the loss by term, accuracy or mIoU, and P of every layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pdvit.files import reading
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, legend, line_styles, name_layers, new_figure, shorten

# Columns that each type of record needs.
NEEDED = {"train": {"epoch", "class"}, "eval": {"epoch", "accuracy"}, "similarity": {"epoch", "layers", "similarity"}}
# Columns of train records that are no part of the loss.
OTHERS = ("kind", "step", "epoch", "loss", "accuracy", "lr", "grad_norm", "skipped", "bad_images", "time")
SCORES = {"miou": "mIoU", "accuracy": "accuracy"}  # the first is drawn: evaluations of a segmentation have both
Records = dict[str, pd.DataFrame]  # by type


def read_records(run: Path) -> Records:
    """Read metrics.jsonl as one table per type of record. Raises UserError if it is damaged or has no evaluation."""
    file = run / "metrics.jsonl"
    records: dict[str, list[dict[str, Any]]] = {}
    with reading(file, "wait for the first evaluation of the run, or restore the file"):
        *lines, _ = file.read_text(encoding="utf-8").split("\n")  # the run may be writing the last line
        for line in lines:
            record = json.loads(line)
            records.setdefault(record["kind"], []).append(record)
        tables = {name: pd.DataFrame(records.get(name, [])) for name in NEEDED}
        for name, table in tables.items():
            if missing := sorted(NEEDED[name] - set(table)):
                raise ValueError(f"it has no {name} records with '{missing[0]}'")
    return tables


def plot_training(runs: Mapping[str, Records], theme: Theme = LIGHT) -> Drawing:
    """Draw one row per run: loss by term, validation accuracy or mIoU, and P over epoch and layer."""
    data = []
    every = dict.fromkeys(str(name) for records in runs.values() for name in records["train"] if name not in OTHERS)
    styles = {term: {**style, "marker": ""} for term, style in zip(every, line_styles(len(every), theme), strict=True)}
    with new_figure(DOUBLE, 2.2 * len(runs) + 0.3, theme) as figure:
        legend(figure, styles)
        grid = figure.subplots(len(runs), 3, squeeze=False)
        for (loss, score, heat), (name, records) in zip(grid, runs.items(), strict=True):
            train, evaluation, probe = (records[record] for record in NEEDED)
            terms = [name for name in styles if name in train]
            for term in terms:
                loss.plot(train["epoch"], train[term], label=term, **styles[term])
            loss.set(title=f"{shorten(name)}\nloss by term, unweighted", xlabel="epoch")
            loss.set_ylim(min(0.0, train[terms].min().min()))  # KoLeo may be negative
            key = next(key for key in SCORES if key in evaluation)
            score.plot(evaluation["epoch"], evaluation[key] * 100, marker=".", color=theme.ink)
            title = f"validation {SCORES[key]}, % (best {evaluation[key].max() * 100:.1f})"
            score.set(title=title, xlabel="epoch", ylim=(0, 100))
            edges = [0.0, *probe["epoch"]]  # a column reaches from the evaluation before to its own
            names, values = probe["layers"].iloc[-1], pd.DataFrame(probe["similarity"].tolist()).T
            heights = [layer - 0.5 for layer in range(len(names) + 1)]
            image = heat.pcolormesh(edges, heights, values, vmin=0, vmax=1, cmap="viridis")  # monotone in grey
            name_layers(heat.yaxis, names, 8)
            heat.set(title="P by layer on the probe", xlabel="epoch")
            heat.grid(visible=False)
            figure.colorbar(image, ax=heat, label="P")
            layers = probe[["epoch", "layers", "similarity"]].explode(["layers", "similarity"])
            data += [
                train.melt("epoch", terms, "of", "value").assign(run=name, panel="loss"),
                evaluation[["epoch", key]].rename(columns={key: "value"}).assign(run=name, panel=SCORES[key]),
                layers.rename(columns={"layers": "of", "similarity": "value"}).assign(run=name, panel="P"),
            ]
        figure.data = pd.concat(data, ignore_index=True)[["run", "panel", "of", "epoch", "value"]]
        figure.data = figure.data.astype({"value": float})
        return figure
