"""Which model a checkpoint's weights belong to: by its own words, by the user's, and by the shapes of its tensors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from pdvit.config import build
from pdvit.config.schema import CROP_MODES, INTERPOLATIONS, SegmentConfig
from pdvit.errors import UserError
from pdvit.models.build import plain_sketch, sketch_model
from pdvit.models.checkpoints import Checkpoint, read_checkpoint
from pdvit.models.layers import with_image_size
from pdvit.models.matching import Chosen, choose
from pdvit.models.segmentation.backbone import Adapter, look_at

COPY = "copy the file again"
# Widths of timm's plain vision transformers, with the sizes in their names.
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


@dataclass(frozen=True)
class Described:
    """A checkpoint with its model.

    Attributes:
        name: what the checkpoint is called.
        where: how an error names it.
        architecture: timm's name of the model.
        arguments: timm's arguments of it.
        sketch: the model itself on the meta device, to look at its shapes.
        chosen: its weights.
        input: mean, std, crop_pct, interpolation and crop_mode of its images, as far as it says them.
        config: what it says of itself, as timm's config.json.
        segment: of a segmentation model, its head and how it is evaluated; the sketch is then its backbone.
        adapter: how a backbone's maps are read; None of other checkpoints.
    """

    name: str
    where: str
    architecture: str
    arguments: dict[str, Any]
    sketch: nn.Module
    chosen: Chosen
    input: dict[str, Any]
    config: dict[str, Any]
    segment: SegmentConfig | None = None
    adapter: Adapter | None = None

    @property
    def weights(self) -> str:
        """Which weights these are: `raw`, `ema`, or `unknown` where neither file nor names say so."""
        return self.chosen.weights

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, where the checkpoint says them; raises UserError where they are no names."""
        return class_names(self.config, self.where)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of its images in pixels, where its configuration says them."""
        size = _images(self.config).get("input_size")
        return None if size is None else (size[1], size[2])


def class_names(config: dict[str, Any], where: str) -> list[str] | None:
    """Return the names of the classes in a config.json; UserError where they are no list of names."""
    told = config.get("pretrained_cfg")
    names = config.get("label_names") or (told.get("label_names") if isinstance(told, dict) else None)
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise UserError("its label_names are not a list of names", where, "mend its config.json")
    return names


def describe(given: str | Path, model_name: str | None = None, weights: str | None = None) -> Described:
    """Read a checkpoint and find out its model.

    Args:
        given: what `read_checkpoint` takes.
        model_name: timm's name of the model; where the checkpoint says another, its arguments count for nothing.
        weights: `raw` or `ema`, where it holds both; None takes the moving average.

    Raises:
        UserError: it can't be read, does not say its model, describes none, or has no such weights.
    """
    if weights not in (None, "raw", "ema"):
        raise UserError(f"there are no weights called '{weights}'", "model.weights (--weights)", "choose raw or ema")
    checkpoint = read_checkpoint(given)
    config, where = checkpoint.config, checkpoint.where
    if model_name is None and not isinstance(config.get("architecture"), str):
        raise _nameless(checkpoint)
    architecture = model_name or str(config["architecture"])
    plain = plain_sketch(architecture, where)  # a family that is refused never sees the arguments
    arguments = _arguments(config, where) if architecture == config.get("architecture") else {}
    if isinstance(arguments.get("depth"), int) and arguments["depth"] > len(checkpoint.tensors):
        raise UserError("its configuration has more blocks than the file has tensors", where, COPY)
    sketch = sketch_model(architecture, arguments, where) if arguments else plain
    chosen = choose(checkpoint.tensors, sketch.state_dict().keys(), weights, where, weights_told(config))
    seen = {key: value for key, value in _by_shape(chosen.tensors, sketch).items() if key not in arguments}
    arguments |= seen
    segment = _segment(config, where)
    if seen or segment is not None:  # the plain sketch is not to be pruned
        sketch = sketch_model(architecture, arguments, where)
    adapter = None if segment is None else look_at(sketch, str(segment.head))
    told = _input(config, where)
    return Described(checkpoint.name, where, architecture, arguments, sketch, chosen, told, config, segment, adapter)


def expect_input(model: Any, described: Described) -> None:
    """Let a model expect the images that its checkpoint describes."""
    model.pretrained_cfg = model.pretrained_cfg | described.input
    if size := described.image_size:
        with_image_size(model, *size)  # models that take any size know theirs from nowhere else


def weights_told(config: dict[str, Any]) -> str:
    """Return which weights a config.json of pdvit says these are: `raw`, `ema`, or `unknown` where it does not."""
    facts = config.get("pdvit")
    told = facts.get("weights") if isinstance(facts, dict) else None
    return told if told in ("raw", "ema") else "unknown"


def _segment(config: dict[str, Any], where: str) -> SegmentConfig | None:
    """Return what a config.json of pdvit says of a segmentation model's head; UserError where it makes no sense."""
    facts = config.get("pdvit")
    told = facts.get("segment") if isinstance(facts, dict) else None
    if told is None:
        return None
    segment = build((where, {"segment": told})).segment
    if segment.head is None or segment.crop is None:
        raise UserError("its configuration says no head or no crop of its segmentation", where, COPY)
    return segment


def _nameless(checkpoint: Checkpoint) -> UserError:
    """Return the error of a checkpoint that does not say its model, with the names that its tensors suggest."""
    called = checkpoint.config.get("called")
    more = f": it calls it '{called}', which is not timm's name" if called else ""
    tip = "put its config.json beside it, or name the timm model: --model NAME"
    if seen := _looks_like(checkpoint.tensors):
        tip = f"name the timm model: --model NAME. {seen}"
    return UserError(f"the file does not say which architecture its weights belong to{more}", checkpoint.where, tip)


def _looks_like(tensors: Mapping[str, Tensor]) -> str:
    """Say what the tensors of a plain vision transformer show; nothing for others."""
    patches = [value for name, value in tensors.items() if name.endswith("patch_embed.proj.weight") and value.ndim == 4]
    if not patches:
        return ""
    width, side = patches[0].shape[0], patches[0].shape[-1]
    numbers = [int(name.split("blocks.")[1].split(".")[0]) for name in _numbered(tensors)]
    staged = any("layers." in name and "blocks." in name for name in tensors)
    if not numbers or staged:
        return ""
    guess = f"vit_{SIZES.get(width)}_patch{side}_224"
    like = f", like {guess}" if timm.is_model(guess) else ""
    return f"Its tensors are {max(numbers) + 1} blocks of width {width} with patches of {side} pixels{like}"


def _numbered(tensors: Iterable[str]) -> list[str]:
    return [name for name in tensors if "blocks." in name and name.split("blocks.")[1].split(".")[0].isdecimal()]


def _arguments(config: dict[str, Any], where: str) -> dict[str, Any]:
    arguments: Any = config.get("model_args", {})
    if not isinstance(arguments, dict):
        raise UserError("its model_args are not a table", where, COPY)
    # published folders often say these two at the top only
    top: dict[str, Any] = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    top |= arguments
    size = top.get("img_size")
    if isinstance(size, list):
        top["img_size"] = size = tuple(size)
    if not (
        size is None or _is_side(size) or (isinstance(size, tuple) and len(size) == 2 and all(map(_is_side, size)))
    ):
        raise UserError(f"its img_size is {size!r}", where, COPY)
    return top


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _images(config: dict[str, Any]) -> Any:
    """Return the part of a config.json that is about images."""
    return config.get("pretrained_cfg") or config


def _by_shape(tensors: Mapping[str, Tensor], sketch: Any) -> dict[str, Any]:
    """Return what the shapes say of the model: the number of classes, and the side of the image.

    The latter only where each patch of a square image has its position.
    """
    told = sketch.pretrained_cfg.get("classifier") or ()
    heads = [tensors.get(f"{name}.weight") for name in (*((told,) if isinstance(told, str) else told), "head")]
    classes = next((len(head) for head in heads if head is not None and head.ndim in (2, 4)), 0)
    arguments: dict[str, Any] = {"num_classes": classes}
    own, theirs = getattr(sketch, "pos_embed", None), tensors.get("pos_embed")
    grid = getattr(getattr(sketch, "patch_embed", None), "grid_size", None)
    if isinstance(own, Tensor) and theirs is not None and grid and own.ndim == theirs.ndim == 3:
        patches = theirs.shape[1] - (own.shape[1] - grid[0] * grid[1])
        side = math.isqrt(max(0, patches))
        if side * side == patches > 0 and theirs.shape[1] != own.shape[1]:
            arguments["img_size"] = side * int(sketch.patch_embed.patch_size[0])
    return arguments


def _input(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return what a checkpoint says of its images; UserError where that makes no sense."""
    told = _images(config)
    if not isinstance(told, dict):
        raise UserError("its pretrained_cfg is not a table", where, COPY)
    size = told.get("input_size")
    if not (size is None or (isinstance(size, list | tuple) and len(size) == 3 and all(map(_is_side, size)))):
        raise UserError(f"its input_size is {size!r}", where, COPY)
    told = {key: told[key] for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode") if key in told}
    for key in ("mean", "std"):
        value = told.get(key, [0.5] * 3)
        sound = isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))
        if not sound or (key == "std" and min(value) <= 0):
            raise UserError(f"its {key} is not three numbers", where, COPY)
    crop = told.get("crop_pct", 1.0)
    if not (_is_number(crop) and 0.05 < crop <= 2):
        raise UserError(f"its crop_pct is {crop!r}", where, COPY)
    for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if told.get(key, known[0]) not in known:
            raise UserError(f"its {key} is {told[key]!r}", where, f"pdvit knows {', '.join(known)}")
    return told
