"""The model of a checkpoint: by its configuration, the user's choice, and the shapes of its tensors."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from pdvit.config import build
from pdvit.config.schema import PREPROCESSING, ModelConfig, SegmentConfig
from pdvit.errors import UserError
from pdvit.models.build import build_model, model_arguments, sketch_model
from pdvit.models.checkpoints import name_of, read_checkpoint
from pdvit.models.families import family_of
from pdvit.models.layouts.conversion import VIT_SIZES, Converted, is_square
from pdvit.models.matching import SelectedWeights, classifiers_of, select_weights
from pdvit.models.segmentation.segmenter import Adapter, make_adapter, prune

Palette = list[tuple[int, int, int]]
COPY = "copy the file again"


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """A checkpoint with its model; of the later fields, those that its configuration sets."""

    name: str
    where: str  # its place in error messages
    architecture: str  # timm's name and arguments of the model
    arguments: dict[str, Any]
    model: nn.Module  # on the meta device, of a segmentation model the pruned backbone; whole after `load_model`
    selected: SelectedWeights  # without tensors after `load_model`
    preprocessing: dict[str, Any] = field(default_factory=dict)  # mean, std, crop_pct, interpolation and crop_mode
    image_size: tuple[int, int] | None = None  # height and width in pixels
    classes: list[str] | None = None  # their names
    segment: SegmentConfig | None = None  # of a segmentation model: its head and evaluation; the crop is set
    adapter: Adapter | None = None  # of a segmentation model: how its backbone is read
    palette: Palette | None = None  # of a segmentation model: a colour for each class
    notes: tuple[str, ...] = ()  # what the file leaves open
    resized: bool = False  # whether the image size is not the file's

    def keeps_classifier(self, classes: Sequence[str]) -> bool:
        """Return whether the file's classifier is for these classes, as far as the file says."""
        return self.arguments.get("num_classes") == len(classes) and self.classes in (None, list(classes))

    def with_random_weights(self) -> nn.Module:
        """Return the model, as pruned, with timm's initialisation, on the CPU; torch's generators keep their state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_model(self.architecture, self.arguments, f"{self.architecture} with random weights").eval()
        if self.adapter:
            prune(model, self.adapter)
        return model


def resolve_checkpoint(
    source: str | Path,
    model_name: str | None = None,
    weights: str | None = None,
    settings: ModelConfig | None = None,
    img_size: int | None = None,
) -> ResolvedCheckpoint:
    """Read a checkpoint and find its model; raises UserError if its configuration is missing or invalid.

    `model_name` is timm's name of the model; if the checkpoint names another, its arguments are ignored. `weights` is
    `raw` or `ema`, if it holds both; None prefers the moving average. `settings` (sizes, arguments) and `img_size` come
    before those of the file.
    """
    where, read = read_checkpoint(source)
    config, tensors = read.config, read.tensors
    if model_name is None and not isinstance(config.get("architecture"), str):
        raise _unknown_architecture(where, read)
    architecture = model_name or str(config["architecture"])
    arguments = _model_arguments(config, where) if architecture == config.get("architecture") else {}
    arguments |= model_arguments(replace(settings or ModelConfig(), name=architecture), img_size, arguments)
    blocks = re.findall(r"\d{1,9}", f"{arguments.get('depth')} {arguments.get('depths')}")
    if sum(map(int, blocks)) > len(tensors):
        raise UserError("its configuration has more blocks than the file has tensors", where, COPY)
    sketch, section = sketch_model(architecture, arguments, where), _table(config, "pdvit", where)
    selected = select_weights(tensors, sketch.state_dict().keys(), weights, where, section.get("weights"))
    inferred = {key: value for key, value in _infer(selected.tensors, sketch, where).items() if key not in arguments}
    arguments |= inferred
    told = ", ".join(f"{key} {value}" for key, value in inferred.items() if key not in ("num_classes", "img_size"))
    chosen = {"--model": model_name, "--heads": settings and settings.heads}  # what a note asks for
    notes = [note for note in read.notes if not any(value and flag in note for flag, value in chosen.items())]
    notes += [f"by its tensors, other than {architecture}: {told}"] if told else []
    sketch = sketch_model(architecture, arguments, where)
    segment: SegmentConfig | None = None
    if section.get("segment") is not None:
        segment = build((where, {"segment": section["segment"]})).segment
        if segment.head is None or segment.crop is None:
            raise UserError("its configuration has no head or no crop of a segmentation model", where, COPY)
        sketch = copy.deepcopy(sketch)  # to prune it
    images = _table(config, "pretrained_cfg", where) or config  # old files have these settings at the top
    if model_name is not None and not images.get("mean") and (tags := _normalisations(model_name)):
        own = f"here that of {model_name}; weights of timm have {tags}"
        notes.append(f"the file does not contain its normalisation, {own}")
    classes = config.get("label_names") or images.get("label_names")
    if not (classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))):
        raise UserError("its label_names are not a list of names", where, "correct its config.json")
    data = build((where, {"data": {key: images[key] for key in PREPROCESSING if key in images}})).data
    size = _checked_size(images.get("input_size"), "input_size", where, channels=True)
    return ResolvedCheckpoint(
        name=name_of(Path(source).expanduser()),
        where=where,
        architecture=architecture,
        arguments=arguments,
        model=sketch,
        selected=selected,
        preprocessing={key: value for key in PREPROCESSING if (value := getattr(data, key)) is not None},
        image_size=(img_size, img_size) if img_size else size,
        classes=classes,
        segment=segment,
        adapter=None if segment is None else make_adapter(sketch, str(segment.head)),
        palette=None if segment is None else _palette(section.get("palette"), len(classes or ()), where),
        notes=tuple(notes),
        resized=img_size is not None,
    )


def _normalisations(name: str) -> str:
    """Return the normalisations of timm's weights of a model with a name for each; empty unless there are several."""
    published = reversed(timm.list_pretrained(f"{name}.*"))
    tags = {cfg.mean[0]: full for full in published if (cfg := timm.get_pretrained_cfg(full)) is not None}
    named = [f"mean {mean:g}, ...: --model {full}" for mean, full in sorted(tags.items())]
    return ", or ".join(named) if len(named) > 1 else ""


def _table(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise UserError(f"its {key} is not a table", where, COPY)
    return table


def _palette(colours: Any, count: int, where: str) -> Palette | None:
    """Return the colours of the classes; raises UserError unless there are `count`, of three bytes each."""
    if colours is None:
        return None
    with suppress(TypeError, ValueError):  # not a list, or not of triples
        palette = [(red, green, blue) for red, green, blue in colours]
        if len(palette) == count and all(type(value) is int and value in range(256) for value in chain(*palette)):
            return palette
    raise UserError("its palette does not have one colour for each class", where, COPY)


def _model_arguments(config: dict[str, Any], where: str) -> dict[str, Any]:
    # published folders often have these two at the top only
    top = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    arguments = top | _table(config, "model_args", where)
    if (size := arguments.get("img_size")) is not None:
        sides = _checked_size(size if isinstance(size, list) else [size, size], "img_size", where)
        arguments["img_size"] = sides if isinstance(size, list) else size
    return arguments


def _checked_size(size: Any, name: str, where: str, channels: bool = False) -> tuple[int, int] | None:
    """Return height and width of a size in a config.json, `[C, H, W]` with channels; raises UserError."""
    if size is None:
        return None
    sides = list(size) if isinstance(size, list | tuple) else []
    if len(sides) != 2 + channels or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"its {name} is {size!r}", where, COPY)
    return sides[-2], sides[-1]


def _infer(tensors: Mapping[str, Tensor], sketch: Any, where: str) -> dict[str, Any]:
    """Return arguments by shapes: classes, image size of square positions; depth, registers, pooling of a plain ViT."""
    names = [f"{name}.weight" for name in (*classifiers_of(sketch), "head")]
    heads = [tensors[name] for name in names if name in tensors]
    arguments: dict[str, Any] = {"num_classes": next((len(head) for head in heads if head.ndim in (2, 4)), 0)}
    registers = 0
    if isinstance(sketch, VisionTransformer):
        registers = tensors["reg_token"].shape[1] - sketch.num_reg_tokens if "reg_token" in tensors else 0
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
        whole = blocks == set(map(str, range(len(blocks))))  # otherwise some are missing
        arguments |= {"depth": len(blocks)} if blocks and whole and len(blocks) != len(sketch.blocks) else {}
        arguments |= {"reg_tokens": sketch.num_reg_tokens + registers} if registers else {}
        if "fc_norm.weight" in tensors and isinstance(sketch.fc_norm, nn.Identity):
            arguments["global_pool"] = "avg"
    own, theirs = getattr(sketch, "pos_embed", None), tensors.get("pos_embed")
    grid = getattr(getattr(sketch, "patch_embed", None), "grid_size", None)
    if isinstance(own, Tensor) and theirs is not None and grid and own.ndim == theirs.ndim == 3:
        prefix = own.shape[1] - grid[0] * grid[1]
        prefix += registers if prefix else 0  # they have positions if the class token has one
        if registers and is_square(theirs.shape[1]) > is_square(theirs.shape[1] - prefix):
            arguments["no_embed_class"], prefix = True, 0
        prefix += not prefix and "register_tokens" in tensors  # DINOv2's class position, which timm's filter removes
        patches = theirs.shape[1] - prefix
        if patches != grid[0] * grid[1] and family_of(sketch).plain and not is_square(patches):
            what = f"its position embeddings are those of {patches} patches, which are no square"
            tip = "put its config.json beside it, with img_size in model_args: [height, width], or name another --model"
            raise UserError(what, where, tip)
        if is_square(patches) and patches != grid[0] * grid[1]:
            arguments["img_size"] = math.isqrt(patches) * int(sketch.patch_embed.patch_size[0])
    return arguments


def _unknown_architecture(where: str, read: Converted) -> UserError:
    """Return the error of a checkpoint without timm's name of its model; the tip names a similar plain model."""
    what, tensors = "the file does not name the architecture of its weights", read.tensors
    if name := read.config.get("foreign_name"):
        what += f": '{name}' is not timm's name"
    tip = "put its config.json beside it, or name the timm model: --model NAME"
    found = [re.search(r"blocks\.(\d+)\.", name) for name in tensors if "layers." not in name]
    depth = len({block[1] for block in found if block})
    patches = [value for name, value in tensors.items() if name.endswith("patch_embed.proj.weight") and value.ndim == 4]
    if patches and depth:
        width, side = patches[0].shape[0], patches[0].shape[-1]
        guess = f"vit_{VIT_SIZES.get(width)}_patch{side}_224"
        like = f", like {guess}" if timm.is_model(guess) else f": --depth {depth} --width {width} --patch-size {side}"
        like += f", of which timm has weights with {tags}" if (tags := _normalisations(guess)) else ""
        tip += f". It has {depth} blocks of width {width}, patches of {side} pixels{like}"
    return UserError(what, where, tip)
