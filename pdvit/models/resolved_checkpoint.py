"""The model of a checkpoint: by its configuration, the user's choice, and the shapes of its tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from pdvit.config import build
from pdvit.config.schema import SegmentConfig
from pdvit.errors import UserError
from pdvit.models.build import plain_sketch, sketch_model
from pdvit.models.checkpoints import Checkpoint, read_checkpoint
from pdvit.models.matching import SelectedWeights, classifiers_of, select_weights
from pdvit.models.segmentation.backbone import Adapter, make_adapter

COPY = "copy the file again"
PREPROCESSING = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
# A centre crop of a smaller fraction would need images too large for memory.
MIN_CROP = 0.05
# Sizes in the names of timm's plain vision transformers, by width.
VIT_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """A checkpoint with its model.

    Attributes:
        name: the checkpoint's name.
        where: its place in error messages.
        architecture, arguments: timm's name and arguments of the model.
        sketch: the model on the meta device; of a segmentation model, its pruned backbone.
        selected: its weights.
        preprocessing: mean, std, crop_pct, interpolation and crop_mode, as far as its configuration sets them.
        image_size: height and width in pixels, if its configuration sets them.
        classes: their names, if its configuration has them.
        segment, adapter: of a segmentation model, its head and evaluation, and how its backbone is read.
        config: contents of its config.json.
    """

    name: str
    where: str
    architecture: str
    arguments: dict[str, Any]
    sketch: nn.Module
    selected: SelectedWeights
    preprocessing: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    classes: list[str] | None = None
    segment: SegmentConfig | None = None
    adapter: Adapter | None = None
    config: dict[str, Any] = field(default_factory=dict)


def resolve_checkpoint(
    source: str | Path, model_name: str | None = None, weights: str | None = None
) -> ResolvedCheckpoint:
    """Read a checkpoint and find its model.

    Args:
        source: see `read_checkpoint`.
        model_name: timm's name of the model; if the checkpoint names another, its arguments are ignored.
        weights: `raw` or `ema`, if it holds both; None prefers the moving average.

    Raises:
        UserError: it can't be read, has no such weights, or its configuration is missing or invalid.
    """
    if weights not in (None, "raw", "ema"):
        raise UserError(f"there are no weights called '{weights}'", "model.weights (--weights)", "choose raw or ema")
    checkpoint = read_checkpoint(source)
    config, where, tensors = checkpoint.config, checkpoint.where, checkpoint.tensors
    if model_name is None and not isinstance(config.get("architecture"), str):
        raise _unknown_architecture(checkpoint)
    architecture = model_name or str(config["architecture"])
    sketch = plain_sketch(architecture, where)  # refuses unsupported families before it builds anything with arguments
    arguments = _model_arguments(config, where) if architecture == config.get("architecture") else {}
    if isinstance(arguments.get("depth"), int) and arguments["depth"] > len(tensors):
        raise UserError("its configuration has more blocks than the file has tensors", where, COPY)
    if arguments:
        sketch = sketch_model(architecture, arguments, where)
    section = metadata_of(config)
    selected = select_weights(tensors, sketch.state_dict().keys(), weights, where, section.get("weights"))
    inferred = {key: value for key, value in _infer(selected.tensors, sketch).items() if key not in arguments}
    arguments |= inferred
    segment = None if section.get("segment") is None else _segment(section["segment"], where)
    if inferred or segment is not None:  # make_adapter prunes, and the plain sketch is shared
        sketch = sketch_model(architecture, arguments, where)
    images = _images(config, where)
    return ResolvedCheckpoint(
        name=checkpoint.name,
        where=where,
        architecture=architecture,
        arguments=arguments,
        sketch=sketch,
        selected=selected,
        preprocessing=_preprocessing(images, where),
        image_size=_checked_size(images.get("input_size"), "input_size", where, channels=True),
        classes=class_names(config, where),
        segment=segment,
        adapter=None if segment is None else make_adapter(sketch, str(segment.head)),
        config=config,
    )


def class_names(config: dict[str, Any], where: str) -> list[str] | None:
    """Return the names of the classes in a config.json; raises UserError if they are not a list of names."""
    names = config.get("label_names") or _images(config, where).get("label_names")
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise UserError("its label_names are not a list of names", where, "correct its config.json")
    return names


def metadata_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return pdvit's section of a config.json."""
    metadata = config.get("pdvit")
    return metadata if isinstance(metadata, dict) else {}


def _images(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the table of a config.json with the settings of images; old files have them at the top."""
    return _table(config, "pretrained_cfg", where) or config


def _table(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise UserError(f"its {key} is not a table", where, COPY)
    return table


def _preprocessing(images: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the preprocessing in a config.json, with the checks of pdvit's own configuration."""
    data = build((where, {"data": {key: images[key] for key in PREPROCESSING if key in images}})).data
    if data.crop_pct is not None and data.crop_pct <= MIN_CROP:
        raise UserError(f"its crop_pct is {data.crop_pct}", where, COPY)
    return {key: value for key in PREPROCESSING if (value := getattr(data, key)) is not None}


def _segment(section: Any, where: str) -> SegmentConfig:
    """Return the head of a segmentation model, with the checks of pdvit's own configuration."""
    segment = build((where, {"segment": section})).segment
    if segment.head is None or segment.crop is None:
        raise UserError("its configuration has no head or no crop of a segmentation model", where, COPY)
    return segment


def _model_arguments(config: dict[str, Any], where: str) -> dict[str, Any]:
    # published folders often have these two at the top only
    top = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    arguments = top | _table(config, "model_args", where)
    size = arguments.get("img_size")
    if isinstance(size, list):
        arguments["img_size"] = _checked_size(size, "img_size", where)
    elif size is not None:
        _checked_size([size, size], "img_size", where)
    return arguments


def _checked_size(size: Any, name: str, where: str, channels: bool = False) -> tuple[int, int] | None:
    """Return height and width of a size in a config.json, `[C, H, W]` with channels; raises UserError."""
    if size is None:
        return None
    sides = list(size) if isinstance(size, list | tuple) else []
    if len(sides) != 2 + channels or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"its {name} is {size!r}", where, COPY)
    return sides[-2], sides[-1]


def _infer(tensors: Mapping[str, Tensor], sketch: Any) -> dict[str, Any]:
    """Return num_classes by the shape of the classifier, and img_size by that of square position embeddings."""
    names = (*classifiers_of(sketch), "head")
    heads = [tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors]
    arguments: dict[str, Any] = {"num_classes": next((len(head) for head in heads if head.ndim in (2, 4)), 0)}
    own, theirs = getattr(sketch, "pos_embed", None), tensors.get("pos_embed")
    grid = getattr(getattr(sketch, "patch_embed", None), "grid_size", None)
    if isinstance(own, Tensor) and theirs is not None and grid and own.ndim == theirs.ndim == 3:
        patches = theirs.shape[1] - (own.shape[1] - grid[0] * grid[1])
        side = math.isqrt(max(0, patches))
        if side * side == patches > 0 and theirs.shape[1] != own.shape[1]:
            arguments["img_size"] = side * int(sketch.patch_embed.patch_size[0])
    return arguments


def _unknown_architecture(checkpoint: Checkpoint) -> UserError:
    """Return the error of a checkpoint without timm's name of its model; the tip names a similar plain model."""
    what, tensors = "the file does not name the architecture of its weights", checkpoint.tensors
    if name := checkpoint.config.get("foreign_name"):
        what += f": '{name}' is not timm's name"
    tip = "put its config.json beside it, or name the timm model: --model NAME"
    blocks = {name.split("blocks.")[1].split(".")[0] for name in tensors if "blocks." in name and "layers." not in name}
    patches = [value for name, value in tensors.items() if name.endswith("patch_embed.proj.weight") and value.ndim == 4]
    depth = sum(number.isdecimal() for number in blocks)
    if patches and depth:
        width, side = patches[0].shape[0], patches[0].shape[-1]
        guess = f"vit_{VIT_SIZES.get(width)}_patch{side}_224"
        like = f", like {guess}" if timm.is_model(guess) else ""
        tip += f". It has {depth} blocks of width {width}, patches of {side} pixels{like}"
    return UserError(what, checkpoint.where, tip)
