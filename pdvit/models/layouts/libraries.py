"""Finds the library of a checkpoint, and gives its tensors timm's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdvit.files import reading
from pdvit.models.layouts import open_clip, torchvision, training, transformers
from pdvit.models.layouts.conversion import IN_MEMORY, Converted, Tensors, rename

CONVERSIONS = (transformers.convert, open_clip.convert, torchvision.convert, training.convert)


def to_timm(tensors: Tensors, config: Mapping[str, Any], folder: Path, where: str) -> Converted:
    """Return a checkpoint with timm's names, converted if it is of another library.

    `config` is the table of config.json, `folder` where files beside the weights are. Raises UserError if timm has no
    such model, a file beside the weights is missing, or the weights are quantised or an adapter.
    """
    training.refuse_unmerged(tensors, where)
    tensors = rename(tensors, training.WRAPPERS)
    with reading(where, IN_MEMORY, "its weights can't be converted to a model of timm"):
        for convert in CONVERSIONS:
            if (converted := convert(tensors, config, folder, where)) is not None:
                return converted
    return Converted(tensors, dict(config))
