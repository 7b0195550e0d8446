"""Building any timm model, with the checks that make an error readable."""

from functools import cache
from typing import Any

import timm
import torch
from torch import nn

from pdvit.config.schema import ModelConfig
from pdvit.errors import UserError, closest
from pdvit.models.families import family_of
from pdvit.models.layers import MODEL, image_size_of, places_of, shapes_of, with_image_size
from pdvit.models.memory import check_fits

# Arguments of timm's factory that fetch or read files: never taken from a configuration or a checkpoint.
RESERVED = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"}
)
# Arguments that have a key of their own, and its flag.
FLAGS = {
    "img_size": "--img-size",
    "depth": "--depth",
    "embed_dim": "--width",
    "num_heads": "--heads",
    "patch_size": "--patch-size",
    "drop_path_rate": "--drop-path",
}
# Those of them that only plain models have: others take one number for each stage.
PLAIN_SIZES = frozenset({"depth", "embed_dim", "num_heads", "patch_size"})


def model_arguments(model: ModelConfig, img_size: int | None) -> dict[str, Any]:
    """Return timm's arguments for what a resolved configuration sets.

    Where only the width is given, the number of heads keeps the named model's width per head. Raises UserError where
    heads do not divide the width, or timm has no such model.
    """
    named = {
        "img_size": img_size,
        "depth": model.depth,
        "embed_dim": model.width,
        "num_heads": model.heads,
        "patch_size": model.patch_size,
        "drop_path_rate": model.drop_path,
    }
    assert model.name is not None, "resolve the configuration first"
    sizes = {name for name in PLAIN_SIZES if named[name] is not None} | (PLAIN_SIZES & set(model.args or {}))
    plain = not sizes or family_of(plain_sketch(model.name, MODEL)).plain
    if not plain and (refused := sorted(name for name in sizes if named[name] is not None)):
        raise UserError(
            f"{model.name} has stages of different sizes, so one {FLAGS[refused[0]]} can't be given",
            "model (--model)",
            "name timm's own arguments, for example --model-kwargs 'depths=[2,2,2,2]'",
        )
    if taken := sorted(({*FLAGS, "num_classes"} - (set() if plain else PLAIN_SIZES)) & set(model.args or {})):
        tip = f"use {FLAGS[taken[0]]}" if taken[0] in FLAGS else "leave it out: the data decide"
        raise UserError(f"'{taken[0]}' can't be given here", "model.args (--model-kwargs)", tip)
    if model.width is not None or model.heads is not None:
        named |= _width_and_heads(model.name, model.width, model.heads)
    return {name: value for name, value in named.items() if value is not None} | (model.args or {})


def build_model(name: str, arguments: dict[str, Any], where: str = "model.name (--model)") -> nn.Module:
    """Build a timm model with fresh weights.

    Raises:
        UserError: what `sketch_model` refuses, or it is too big for memory.
    """
    check_fits(sketch_model(name, arguments, where).state_dict().values(), where)
    return create_model(name, arguments, where)


def sketch_model(name: str, arguments: dict[str, Any], where: str = "model.name (--model)") -> nn.Module:
    """Build a model on the meta device, where it takes no memory, to look at its shapes.

    Raises:
        UserError: the name is unknown, timm refuses an argument, pdvit can't read the patches, or they do not fit the
            image.
    """
    if not timm.is_model(name):
        raise UserError(f"timm has no model named '{name}'", where, closest(name, timm.list_models(), shown=3))
    if taken := sorted(RESERVED & set(arguments)):
        raise UserError(f"'{taken[0]}' can't be an argument of the model", where, "remove it")
    with torch.device("meta"):
        model = create_model(name, arguments, where)
    _check_grid(model, where)
    return model


@cache
def plain_sketch(name: str, where: str) -> nn.Module:
    """`sketch_model` without arguments, which several look at: leave it as it is."""
    return sketch_model(name, {}, where)


def _width_and_heads(name: str, width: int | None, heads: int | None) -> dict[str, int]:
    if width is None or heads is None:
        parts: Any = plain_sketch(name, MODEL)
        width = width or int(parts.embed_dim)
        heads = heads or max(1, width // (parts.embed_dim // parts.blocks[0].attn.num_heads))
    if width % heads:
        raise UserError(
            f"{heads} heads do not divide a width of {width}",
            "model.width and model.heads (--width, --heads)",
            f"choose a width that is a multiple of {heads}, or another number of heads",
        )
    return {"embed_dim": width, "num_heads": heads}


def patch_size_of(model: nn.Module) -> int:
    """Return the side in pixels of the patch that a token of the last layer stands for."""
    parts: Any = model
    reduction = parts.feature_info[-1]["reduction"]
    return int(reduction if isinstance(reduction, int) else reduction[0])


def create_model(name: str, arguments: dict[str, Any], where: str) -> nn.Module:
    """Build a model whose sketch was looked at before; UserError where timm refuses an argument."""
    try:
        model = timm.create_model(name, **arguments)
    except Exception as error:  # odd arguments fail anywhere inside timm, with any kind of error
        if "img_size" in arguments and "unexpected keyword arg" in str(error) and "'img_size'" in str(error):
            rest = {key: value for key, value in arguments.items() if key != "img_size"}
            size = arguments["img_size"]
            return with_image_size(
                create_model(name, rest, where), *(size if isinstance(size, tuple) else (size, size))
            )
        raise UserError(
            f"timm can't build {name}: {type(error).__name__}: {error}",
            where,
            "check the model's arguments (--model-kwargs)",
        ) from error
    assert isinstance(model, nn.Module)
    return model


def checkpoint_activations(model: Any) -> None:
    """Let a model compute activations twice instead of keeping them; UserError where timm has no such way."""
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        what = f"timm has no gradient checkpointing for a {type(model).__name__}"
        raise UserError(what, "model.grad_checkpointing (--grad-checkpointing)", "leave it out") from error


def _check_grid(model: Any, where: str) -> None:
    places = places_of(model, where)
    if getattr(model, "in_chans", 3) != 3:
        raise UserError("the model does not take images of three channels", where, "use one with in_chans=3")
    height, width = image_size_of(model)
    patch = patch_size_of(model)
    if (height, width) == (patch, patch):
        raise UserError(
            "the image is a single patch, which has nothing to be alike to or different from",
            f"{where}, with its image size and patch size",
            f"choose a larger image, such as {2 * patch} pixels, or smaller patches",
        )
    if height % patch or width % patch:
        near = " or ".join(str(times * patch) for times in (height // patch, height // patch + 1) if times)
        raise UserError(
            f"patches of {patch} pixels do not fit images of {height}x{width}",
            f"{where}, with its image size and patch size",
            f"choose an image size that is a multiple of {patch}, such as {near}",
        )
    last = list(places)[-1]
    found, _ = shapes_of(model, {last: places[last]}, where)[last]
    if found != (height // patch) * (width // patch):
        raise UserError(
            f"{height}x{width} pixels give {found} patches in the last layer, which are not squares of {patch} pixels",
            f"{where}, with its image size and patch size",
            "choose the model's own sizes",
        )
