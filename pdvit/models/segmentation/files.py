"""Segmentation models on disk: a file that describes itself, read without trust in what it says."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdvit.config.schema import SegmentConfig
from pdvit.errors import UserError
from pdvit.models.build import create_model
from pdvit.models.description import COPY, Described, describe, expect_input
from pdvit.models.matching import Match, match
from pdvit.models.segmentation.backbone import prune
from pdvit.models.segmentation.segmenter import Segmenter
from pdvit.models.weights import files, refuse_difference

Palette = list[tuple[int, int, int]]
HEAD = "head."
# What of the configuration a file carries: the head, and how images are evaluated.
FACTS = ("head", "width", "aux", "norm", "crop", "short_side", "mode", "stride")


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmentation model read from disk, and what is known about it.

    Attributes:
        model: in evaluation mode.
        name: what the checkpoint is called.
        classes: their names.
        palette: a colour (0 to 255) for each class, where the file has them.
        segment: the head, and how the run evaluated; the side of its crop is set.
        weights: `raw`, `ema` or `unknown`.
    """

    model: Segmenter
    name: str
    classes: list[str]
    palette: Palette | None
    segment: SegmentConfig
    weights: str


def export_segmenter(
    segmenter: Segmenter,
    classes: list[str],
    palette: Palette | None,
    data_config: dict[str, Any],
    weights: str,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, bytes]:
    """Return the files of a segmentation model (name -> content): weights as `backbone.*` and `head.*`, config.json.

    As `weights.export`, with the same header: the weights alone are enough. timm itself builds no such model.
    """
    facts = {name: value for name, value in asdict(segmenter.segment).items() if name in FACTS and value is not None}
    told = {"weights": weights, "segment": facts} | ({"palette": palette} if palette else {})
    extra = {"label_names": classes, "pdvit": told}
    return files(segmenter.backbone, state or segmenter.state_dict(), extra, data_config)


def load_segmenter(path: str | Path, model_name: str | None = None, weights: str | None = None) -> LoadedSegmenter:
    """Read a segmentation model: all that `weights.load` takes, where it has a head of this kind.

    Raises:
        UserError: nothing is there, the file is broken, it is of another kind, or weights and model differ.
    """
    described = describe(path, model_name, weights)
    segment, adapter, where = described.segment, described.adapter, described.where
    if segment is None or adapter is None:
        raise UserError("it is no segmentation model", where, "train one from it: pdvit segment CKPT")
    classes, palette = described.classes or [], _palette(described)
    if not classes:
        raise UserError("its configuration does not name its classes", where, COPY)
    with torch.device("meta"):
        sketch = Segmenter(described.sketch, adapter, len(classes), segment)
    found = _matched(described, sketch)
    refuse_difference(found, where)  # by shape, before the model takes any memory
    backbone = create_model(described.architecture, described.arguments, where)
    prune(backbone, adapter)
    model = Segmenter(backbone, adapter, len(classes), segment)
    model.load_state_dict(found.tensors)
    expect_input(backbone, described)
    return LoadedSegmenter(model.eval(), described.name, classes, palette, segment, described.weights)


def begin_head(segmenter: Segmenter, described: Described, classes: Sequence[str]) -> str:
    """Take the head of another segmentation model, where classes and shapes are the same; return what to say of it.

    Fresh weights stay where the file has none: an auxiliary head, for example.
    """
    if described.segment is None:
        return "head: fresh"
    if described.classes != list(classes):
        return "head: fresh, as the file's has other classes"
    own = segmenter.head.state_dict()
    theirs = {name.removeprefix(HEAD): value for name, value in described.chosen.outside.items()}
    if any(name in theirs and theirs[name].shape != value.shape for name, value in own.items()):
        return "head: fresh, as the file's has other shapes"
    if described.segment.head != segmenter.segment.head:
        return f"head: fresh, as the file's is of another kind, {described.segment.head}"
    if not all(value.isfinite().all() for value in theirs.values() if value.is_floating_point()):
        raise UserError(
            "weights of its head are infinite or not numbers", described.where, "take an earlier checkpoint"
        )
    taken = {name: value for name, value in theirs.items() if name in own}
    segmenter.head.load_state_dict(taken, strict=False)
    return f"head: {len(taken)} of {len(own)} tensors are the file's"


def _matched(described: Described, sketch: Segmenter) -> Match:
    """Compare a file with backbone and head together."""
    backbone = match(described.chosen.tensors, sketch.backbone, described.where)
    expected = {name: value for name, value in sketch.state_dict().items() if name.startswith(HEAD)}
    outside = described.chosen.outside
    fitting = {name for name in expected if name in outside and outside[name].shape == expected[name].shape}
    under = f"{sketch.inner}."
    tensors = {under + name: value for name, value in backbone.tensors.items()}
    return Match(
        tensors | {name: outside[name] for name in fitting},
        [*(under + name for name in backbone.missing), *sorted(expected.keys() - outside.keys())],
        [*(under + name for name in backbone.misshapen), *sorted((expected.keys() & outside.keys()) - fitting)],
        [*(under + name for name in backbone.left), *sorted(outside.keys() - expected.keys())],
        [under + name for name in backbone.resampled],
    )


def _palette(described: Described) -> Palette | None:
    """Return the colours in a config.json; UserError where they are no colours."""
    told = described.config.get("pdvit", {}).get("palette")
    if told is None:
        return None
    colours: list[Any] = told if isinstance(told, list) and len(told) == len(described.classes or []) else [None]
    if not all(isinstance(colour, list) and len(colour) == 3 and all(map(_is_byte, colour)) for colour in colours):
        raise UserError("its palette is not one colour for each class", described.where, COPY)
    return [(red, green, blue) for red, green, blue in colours]


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
