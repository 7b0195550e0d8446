"""A run over time: the loss by term, accuracy or mIoU, and P of every layer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pdvit.errors import UserError
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, line_styles, new_figure, shorten, thin_ticks, unique

NEEDED = {
    "train": {"epoch", "class"},
    "eval": {"epoch", "accuracy"},
    "similarity": {"epoch", "layers", "similarity"},
}
TERMS = ("class", "aux", "cosine", "contrastive", "mixing", "koleo", "spectral")
# What a run is judged by, the first that its evaluations have: segmentations have both.
SCORES = {"miou": "mIoU", "accuracy": "accuracy"}


def read_records(run: Path) -> dict[str, pd.DataFrame]:
    """Read metrics.jsonl as one table per kind; UserError where it is damaged or holds no evaluation yet."""
    file = run / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        tip = "name a run that was trained by pdvit"
        raise UserError(f"the run has no records that can be read: {error}", str(file), tip) from error
    kinds: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            kinds.setdefault(record["kind"], []).append(record)
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines):
                continue  # of a run that is being written
            raise UserError(f"line {number} is not a record", str(file), "the file is damaged") from error
    tables = {kind: pd.DataFrame(records) for kind, records in kinds.items()}
    if not tables:
        raise UserError("the file holds no records", str(file), "wait for the run's first steps, or restore the file")
    for kind, columns in NEEDED.items():
        if missing := sorted(columns - set(tables.get(kind, pd.DataFrame()).columns)):
            what = f"the run was not evaluated yet: it has no {kind} records with '{missing[0]}'"
            raise UserError(what, str(file), "wait for its first evaluation")
    return tables


def plot_training(runs: Sequence[dict[str, pd.DataFrame]], names: Sequence[str], theme: Theme = LIGHT) -> Drawing:
    """Draw one row per run: loss by term, validation accuracy or mIoU, and P over epoch and layer.

    Args:
        runs: records by kind, as `read_records` returns them.
        names: what each run is called.
        theme: colours.
    """
    with new_figure(DOUBLE, 2.2 * len(runs), theme, rows=len(runs), columns=3) as figure:
        figure.data = pd.concat([_table(*pair) for pair in zip(runs, unique(names), strict=True)], ignore_index=True)
        for row, (records, name) in enumerate(zip(runs, names, strict=True)):
            loss, score, heat = figure.axes[3 * row : 3 * row + 3]
            _draw_loss(loss, records["train"], theme)
            loss.set_title(f"{shorten(name, 18)}: loss by term")
            evaluation, key = records["eval"], _score(records)
            score.plot(evaluation["epoch"], evaluation[key] * 100, marker=".", color=theme.ink)
            best = evaluation[key].max() * 100
            score.set(title=f"validation {SCORES[key]}, % (best {best:.1f})", xlabel="epoch", ylim=(0, 100))
            _heat_map(heat, records["similarity"])
        return figure


def _draw_loss(axes: Axes, train: pd.DataFrame, theme: Theme) -> None:
    terms = _terms(train)
    for term, look in zip(terms, line_styles(len(terms), theme), strict=True):
        axes.plot(train["epoch"], train[term], label=term, **{**look, "marker": ""})
    lowest = min(0.0, train[terms].min().min())  # KoLeo may be negative
    axes.set(xlabel="epoch", ylabel="unweighted", ylim=(lowest, None))
    axes.legend()


def _score(records: dict[str, pd.DataFrame]) -> str:
    return next(key for key in SCORES if key in records["eval"])


def _terms(train: pd.DataFrame) -> list[str]:
    return [term for term in TERMS if term in train]


def _table(records: dict[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """Return one row per number: its panel (loss, the score, P), what it is of (a term, a layer), and its epoch."""
    loss = records["train"].melt("epoch", _terms(records["train"]), "of", "value").assign(panel="loss")
    key = _score(records)
    score = records["eval"][["epoch", key]].rename(columns={key: "value"}).assign(panel=SCORES[key])
    probe = records["similarity"][["epoch", "layers", "similarity"]].explode(["layers", "similarity"])
    probe = probe.rename(columns={"layers": "of", "similarity": "value"}).assign(panel="P")
    whole = pd.concat([loss, score, probe], ignore_index=True).assign(run=name)
    return whole[["run", "panel", "of", "epoch", "value"]].astype({"value": float})


def _heat_map(axes: Axes, similarity: pd.DataFrame) -> None:
    """Draw P on the probe: epochs across, layers upwards, 0 to 1 in a map that is monotone in grey."""
    layers = similarity["layers"].iloc[-1]
    grid = pd.DataFrame(similarity["similarity"].tolist()).T
    # a column reaches from the evaluation before to its own, however far apart they are
    edges = [0.0, *similarity["epoch"]]
    heights = [layer - 0.5 for layer in range(len(layers) + 1)]
    image = axes.pcolormesh(edges, heights, grid, vmin=0, vmax=1, cmap="viridis")
    ticks = thin_ticks(len(layers), 8)
    axes.set_yticks(ticks, [layers[i].removeprefix("block ") for i in ticks])
    axes.set(title="P by layer on the probe", xlabel="epoch")
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label="P")
