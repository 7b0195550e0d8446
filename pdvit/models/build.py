"""Build any timm model, with readable errors."""

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from pdvit.config.schema import ModelConfig
from pdvit.errors import UserError, closest
from pdvit.models.families import FAMILIES, family_of
from pdvit.models.layers import MODEL, find_layers, image_size_of, shapes_of

# Arguments of timm's factory that fetch or read files: refused in configurations and checkpoints.
RESERVED = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"}
)
# timm's arguments with a key in the configuration: sizes (hierarchical models have one per stage), and flags of all.
SIZES = {"depth": "depth", "embed_dim": "width", "num_heads": "heads", "patch_size": "patch_size"}
FLAGS = {
    argument: f"--{key.replace('_', '-')}"
    for argument, key in {"img_size": "img_size", **SIZES, "drop_path_rate": "drop_path"}.items()
}
GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
# Checked models on the meta device: to build one can take a second, and a run needs the same ones again.
SKETCHES: dict[str, nn.Module] = {}
MAX_SKETCHES = 16
# Limits of a model, whose arguments may be from a file: whole numbers of seven digits, and modules (timm's have 5,000).
TOO_LARGE, MAX_MODULES = r"(?<![\d.])\d{7,}", 20_000


def readable_models() -> list[str]:
    """Return the names of timm's models in its modules with a family that pdvit can read."""
    modules = {
        name: vars(sys.modules.get(timm.model_entrypoint(name).__module__, object)) for name in timm.list_models()
    }
    return [name for name, content in modules.items() if FAMILIES.keys() & content.keys()]


def model_arguments(model: ModelConfig, img_size: int | None, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return timm's arguments of a resolved configuration; a width alone keeps the width per head. Raises UserError.

    `base` are arguments of the model, as of a file, in which these replace others. Unset width and heads are theirs.
    """
    assert model.name is not None, "resolve the configuration first"
    extra = model.args or {}
    sizes = {name: size for name, key in SIZES.items() if (size := getattr(model, key)) is not None}
    plain = not (sizes or SIZES.keys() & extra.keys()) or family_of(sketch_model(model.name, {})).plain
    if sizes and not plain:
        what = f"{model.name} has stages of different sizes, so {FLAGS[min(sizes)]} can't be used"
        raise UserError(what, MODEL, "name timm's own arguments, for example --model-kwargs 'depths=[2,2,2,2]'")
    if taken := sorted(({*FLAGS, "num_classes"} - (set() if plain else SIZES.keys())) & extra.keys()):
        tip = f"use {FLAGS[taken[0]]}" if taken[0] in FLAGS else "leave it out: the data decide"
        raise UserError(f"'{taken[0]}' can't be given here", "model.args (--model-kwargs)", tip)
    width, heads = model.width, model.heads
    if width is not None or heads is not None:
        sketch: Any = sketch_model(model.name, dict(base or {}))
        own_heads = getattr(getattr(sketch.blocks[0], "attn", None), "num_heads", None)
        if own_heads is None:
            where = "model.width, model.heads (--width, --heads)"
            raise UserError(f"{model.name} has a fixed width and no attention heads", where, "name another model")
        width = width or int(sketch.embed_dim)
        heads = heads or max(1, width // (sketch.embed_dim // own_heads))
        if width % heads:
            tip = f"choose a width that is a multiple of {heads}, or another number of heads"
            raise UserError(f"{heads} heads do not divide a width of {width}", "model.width, model.heads", tip)
        sizes |= {"embed_dim": width, "num_heads": heads}
    named = {"img_size": img_size, **sizes, "drop_path_rate": model.drop_path}
    return {name: value for name, value in named.items() if value is not None} | extra


def build_model(name: str, arguments: dict[str, Any], where: str = MODEL) -> nn.Module:
    """Build a timm model with fresh weights; raises UserError as `sketch_model`, or if memory does not suffice."""
    check_memory(sketch_model(name, arguments, where), where)
    return create_model(name, arguments, where)


def sketch_model(name: str, arguments: dict[str, Any], where: str = MODEL) -> nn.Module:
    """Build a model on the meta device, where it takes no memory. Calls share it: copy it before a change.

    Raises UserError if timm refuses name or arguments, the family is not supported, or patches do not fit the image.
    """
    if not timm.is_model(name):
        raise UserError(f"timm has no model named '{name}'", where, closest(name, readable_models(), shown=3))
    if taken := sorted(RESERVED & arguments.keys()):
        raise UserError(f"'{taken[0]}' can't be an argument of the model", where, "remove it")
    key = f"{name} {arguments}"
    if large := re.search(TOO_LARGE, key):
        raise UserError(f"an argument of the model is too large: {large[0]}", where, "choose a smaller one")
    if key not in SKETCHES:
        modules = count(1)

        def limit(*_: Any) -> None:  # arguments can ask for any depth
            if next(modules) > MAX_MODULES:
                raise ValueError(f"it has more than {MAX_MODULES:,} modules")

        with torch.device("meta"), register_module_module_registration_hook(limit):
            model = create_model(name, arguments, where)
        (_, places), place = find_layers(model, where=where), f"{where}, with its image size and patch size"
        if getattr(model, "in_chans", 3) != 3:
            raise UserError("the model does not take images of three channels", where, "use in_chans=3")
        (height, width), patch = image_size_of(model), strides_of(model)[-1]
        if (height, width) == (patch, patch):
            tip = f"choose a larger image, such as {2 * patch} pixels, or smaller patches"
            raise UserError("the image is a single patch, so there are no two patches to compare", place, tip)
        last, grid = list(places)[-1], -(-height // patch) * -(-width // patch)
        try:  # some models pad other sizes, as Swin does
            tokens = shapes_of(model, {last: places[last]}, where)[last][0]
        except UserError:
            if height % patch == width % patch == 0:
                raise
            tokens = 0
        if tokens != grid:
            near = " or ".join(str(times * patch) for times in (height // patch, height // patch + 1) if times > 1)
            tip = f"choose an image size that is a multiple of {patch}, such as {near}, or the model's own sizes"
            raise UserError(f"square patches of {patch} pixels do not fit images of {height}x{width}", place, tip)
        if len(SKETCHES) == MAX_SKETCHES:
            SKETCHES.clear()
        SKETCHES[key] = model
    return SKETCHES[key]


def create_model(name: str, arguments: dict[str, Any], where: str) -> nn.Module:
    """Build a model without the checks of `sketch_model`; raises UserError if timm refuses an argument."""
    try:
        model: Any = timm.create_model(name, **arguments)
    except Exception as error:  # odd arguments fail anywhere inside timm, with any kind of error
        wrong = re.search(r"(unexpected|multiple values for) keyword argument '(\w+)'", str(error))
        if wrong and wrong.groups() == ("unexpected", "img_size"):
            size = arguments["img_size"]
            height, width = size if isinstance(size, tuple) else (size, size)
            model = create_model(name, {key: value for key, value in arguments.items() if key != "img_size"}, where)
            model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, height, width)}  # where timm reads it
            return model  # type: ignore[no-any-return]
        what, flag = f"timm can't build {name}: {type(error).__name__}: {error}", "--model-kwargs"
        if wrong:
            problem = "has no argument" if wrong[1] == "unexpected" else "has a fixed"
            what, flag = f"{name} {problem} '{wrong[2]}'", FLAGS.get(wrong[2], flag)
        raise UserError(what, where, f"check the model's arguments ({flag})") from error
    return model  # type: ignore[no-any-return]


def strides_of(model: Any) -> list[int]:
    """Return the pixels per token of every map; the last is the side of a patch."""
    reductions = [info["reduction"] for info in model.feature_info]
    return [int(reduction if isinstance(reduction, int) else reduction[0]) for reduction in reductions]


def checkpoint_activations(model: Any) -> None:
    """Switch gradient checkpointing on; raises UserError if timm has none for the model."""
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        what = f"timm has no gradient checkpointing for a {type(model).__name__}"
        raise UserError(what, "model.grad_checkpointing (--grad-checkpointing)", "leave it out") from error


def available_memory() -> int:
    """Return the bytes of main memory that new tensors can take, in the machine and in each control group (v2)."""
    available = int(psutil.virtual_memory().available)
    try:
        group = CGROUPS / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    except OSError:  # not Linux
        return available
    for folder in (group, *group.parents):  # psutil does not read these limits
        try:
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or no limit
            continue
        available = min(available, limit - used + int(stat.get("inactive_file", 0)))  # the cache of files is given back
    return available


def check_memory(weights: nn.Module | Sequence[Path], where: str) -> None:
    """Raise UserError if a model (on the meta device, perhaps) or files of weights exceed the available memory."""
    if isinstance(weights, nn.Module):
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.state_dict().values())
    else:
        size = sum(file.stat().st_size for file in weights)
    available = available_memory()
    if size > available and torch.get_default_device().type != "meta":
        what = f"the model is too big for memory: {size / GIB:.1f} GiB of weights, {available / GIB:.1f} GiB available"
        raise UserError(what, where, "use a machine with more memory, or a smaller model or smaller images")
