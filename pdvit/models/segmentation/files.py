"""Segmentation models on disk: weights with their configuration in the header."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pdvit.config.schema import SegmentConfig
from pdvit.errors import UserError
from pdvit.models.checkpoints import export
from pdvit.models.loading import load_model
from pdvit.models.matching import compare
from pdvit.models.resolved_checkpoint import COPY, ResolvedCheckpoint, metadata_of
from pdvit.models.segmentation.segmenter import HEAD, Segmenter

Palette = list[tuple[int, int, int]]
# Settings in a file: the head, and how images are evaluated.
SETTINGS = ("head", "width", "aux", "norm", "crop", "short_side", "mode", "stride")


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmentation model with the weights of a checkpoint.

    Attributes:
        model: in evaluation mode.
        name: the checkpoint's name.
        classes: their names.
        palette: a colour (0 to 255) for each class, if the file has them.
        segment: the head and the run's evaluation; the crop is set.
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
    """Return the files of a segmentation model: see `checkpoints.export`.

    Weights are named `backbone.*` and `head.*`. timm itself can't load them.
    """
    settings = {key: value for key, value in asdict(segmenter.segment).items() if key in SETTINGS and value is not None}
    metadata: dict[str, Any] = {"segment": settings} | ({"palette": palette} if palette else {})
    return export(segmenter.backbone, classes, data_config, weights, state or segmenter.state_dict(), metadata)


def load_segmenter(checkpoint: ResolvedCheckpoint) -> LoadedSegmenter:
    """Build a checkpoint's segmentation model with its weights.

    Raises:
        UserError: it is not a segmentation model, or weights and model differ.
    """
    segment, adapter, where = checkpoint.segment, checkpoint.adapter, checkpoint.where
    if segment is None or adapter is None:
        raise UserError("it is not a segmentation model", where, "train one from it: pdvit segment CKPT")
    if not checkpoint.classes:
        raise UserError("its configuration does not name its classes", where, COPY)
    palette = _palette(checkpoint)
    with torch.device("meta"):
        sketch = Segmenter(checkpoint.sketch, adapter, len(checkpoint.classes), segment)
    expected = {name: value for name, value in sketch.state_dict().items() if name.startswith(HEAD)}
    head_match = compare(checkpoint.selected.outside, expected)
    head_match.refuse_difference(where)  # before the head takes memory
    loaded = load_model(checkpoint)
    model = Segmenter(loaded.model, adapter, len(checkpoint.classes), segment)
    model.head.load_state_dict({name.removeprefix(HEAD): value for name, value in head_match.tensors.items()})
    return LoadedSegmenter(model.eval(), loaded.name, checkpoint.classes, palette, segment, loaded.weights)


def _palette(checkpoint: ResolvedCheckpoint) -> Palette | None:
    """Return the colours in a config.json; raises UserError if they are invalid."""
    palette = metadata_of(checkpoint.config).get("palette")
    if palette is None:
        return None
    colours: list[Any] = palette if isinstance(palette, list) else []
    valid = all(isinstance(colour, list) and len(colour) == 3 for colour in colours)
    valid = valid and all(type(value) is int and 0 <= value <= 255 for colour in colours for value in colour)
    if not valid or len(colours) != len(checkpoint.classes or []):
        raise UserError("its palette does not have one colour for each class", checkpoint.where, COPY)
    return [(red, green, blue) for red, green, blue in colours]
