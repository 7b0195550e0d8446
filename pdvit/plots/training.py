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
# Each has its style in every figure; markers where lines have the dashes of another.
TERMS = ("class", "cosine", "contrastive", "mixing", "koleo", "spectral", "gram", "aux")
MARKS = 6  # of each term
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
    parts = []
    for name, records in runs.items():
        train, evaluation, probe = (records[record] for record in NEEDED)
        terms, key = [term for term in train if term not in OTHERS], next(key for key in SCORES if key in evaluation)
        layers = probe[["epoch", "layers", "similarity"]].explode(["layers", "similarity"])
        parts += [
            train.melt("epoch", terms, "of", "value").assign(run=name, panel="loss"),
            evaluation[["epoch", key]].rename(columns={key: "value"}).assign(run=name, panel=SCORES[key]),
            layers.rename(columns={"layers": "of", "similarity": "value"}).assign(run=name, panel="P"),
        ]
    data = pd.concat(parts, ignore_index=True)[["run", "panel", "of", "epoch", "value"]].astype({"value": float})
    drawn = [str(term) for term in data[data["panel"] == "loss"]["of"].unique()]
    known = [*TERMS, *(term for term in drawn if term not in TERMS)]
    styles = dict(zip(known, line_styles(len(known), theme), strict=True))
    with new_figure(data, DOUBLE, 2.2 * len(runs) + 0.3, theme) as figure:
        legend(figure, {term: styles[term] for term in drawn})
        grid = figure.subplots(len(runs), 3, squeeze=False, sharex="row")
        for (loss, score, heat), (run, rows) in zip(grid, data.groupby("run", sort=False), strict=True):
            (_, losses), (measure, scores), (_, layers) = rows.groupby("panel", sort=False)
            for term, line in losses.groupby("of", sort=False):
                every = max(1, len(line) // MARKS)
                marks = (every * known.index(str(term)) // len(known), every)  # not where another term has them
                style = styles[str(term)] | {"label": term, "markevery": marks}
                loss.plot(line["epoch"], line["value"], **style, clip_on=False, zorder=3)  # a term of 0 is on the axis
            loss.set(title=f"{shorten(str(run))}\nloss by term, unweighted", xlabel="epoch")
            loss.set_ylim(min(0.0, losses["value"].min()))  # KoLeo may be negative
            loss.set_xlim(0, rows["epoch"].max())
            score.plot(scores["epoch"], scores["value"] * 100, marker=".", color=theme.ink, clip_on=False)
            title = f"val {measure}, % (best {scores['value'].max() * 100:.1f})"
            score.set(title=title, xlabel="epoch", ylim=(0, 100))
            names, values = layers["of"].unique(), layers.pivot(index="of", columns="epoch", values="value")
            edges = [0.0, *values.columns]  # a column reaches from the evaluation before to its own
            heights = [layer - 0.5 for layer in range(len(names) + 1)]
            # Viridis is monotone in grey.
            image = heat.pcolormesh(edges, heights, values.loc[names], vmin=0, vmax=1, cmap="viridis")
            name_layers(heat.yaxis, names, 8)
            heat.set(title="P by layer on the probe", xlabel="epoch")
            heat.grid(visible=False)
            figure.colorbar(image, ax=heat, label="P")
        return figure
