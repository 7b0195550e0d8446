"""What an evaluation gives, whatever the checkpoint does, and the words in which it is shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.cli.checkpoint import Opened, broken_logits
from pdvit.errors import UserError, closest

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.data.sources import Source, Split
    from pdvit.tasks.metrics import ClassificationScores, SegmentationScores

# Classes that the terminal shows.
WORST = 10


@dataclass(frozen=True)
class Evaluation:
    """Numbers by name, a table by class, and the files to write (name -> content)."""

    facts: dict[str, Any]
    table: "pd.DataFrame"
    files: dict[str, bytes]


def split_named(source: "Source", wanted: str | None) -> str:
    """Return the name of the split to measure: unset, that of the closing numbers; UserError where there is none."""
    name = wanted or source.final_split
    if name not in source.splits:
        raise UserError(f"{source.name} has no split '{name}'", "--split", closest(name, source.splits))
    return name


def first_of(split: "Split", limit: int | None) -> "Split":
    """Return the first `limit` images of a split, or all."""
    import torch

    return split if limit is None or limit >= len(split) else split.take(torch.arange(limit))


def facts_of(
    opened: Opened,
    path: Path,
    source: "Source",
    split: str,
    images: "Split",
    matched: str,
    scores: "ClassificationScores | SegmentationScores",
) -> dict[str, Any]:
    """Return what is told of any evaluation: of which checkpoint it is, on what, and how.

    Raises UserError where the model's logits were not all finite.
    """
    from pdvit.engine.device import device_name

    precision = opened.config.run.precision
    if scores.broken:
        raise broken_logits(f"{scores.broken} of {scores.images} images", path, precision)
    return {
        "checkpoint": str(path),
        "model": opened.loaded.name,
        "weights": opened.loaded.weights,
        "data": source.name,
        "split": split,
        "images": scores.images,
        "bad_images": len(images) - scores.images,
        "classes": len(source.classes),
        "matched": matched,
        "precision": precision,
        "device": device_name(opened.device),
        "processes": opened.loading.processes,
    }


def share(value: float | None) -> str:
    """Write a share as a percentage; one of nothing is a dash."""
    return "-" if value is None or value != value else f"{value:.1%}"
