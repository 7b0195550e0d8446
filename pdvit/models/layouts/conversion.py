"""What layouts share: renames by regular expression, joined projections, and a plain model's sizes by its tensors."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
# Regular expression -> replacement, applied in order to every name; None removes the tensors that match.
Rules = Sequence[tuple[str, str | None]]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
# Sizes in the names of timm's plain models by width, and the heads of widths where these are not width / 64.
VIT_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
VIT_HEADS = {1280: 16, 1408: 16, 1664: 16}
TOKENS = ("cls_token", "reg_token", "pos_embed")
NO_HEAD = "its head has no counterpart in timm (a hidden layer, or two tokens): left out"
IN_MEMORY = "measure it in Python, if it is a transformer: pdvit.analyze(model, images, blocks='encoder.layers')"


@dataclass(frozen=True)
class Converted:
    """The contents of a checkpoint, those of another library under timm's names."""

    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)  # the model and its images in the form of timm's config.json
    notes: list[str] = field(default_factory=list)  # what the file leaves open


def convert_each(
    tensors: Mapping[str, Tensor], anchor: str, convert: Callable[[Tensors, str], Converted | None]
) -> Converted | None:
    """Convert each set of weights in a file by `convert(tensors, prefix)`; None if none is known.

    A prefix is the text before the name `anchor` (a regular expression). Other tensors stay as they are.
    """
    pattern = re.compile(rf"((?:.+\.)?)(?:{anchor})")
    prefixes = sorted({match[1] for name in tensors if (match := pattern.fullmatch(name))}, key=len)
    owners = {name: next((p for p in reversed(prefixes) if name.startswith(p)), None) for name in tensors}
    result, found = {name: value for name, value in tensors.items() if owners[name] is None}, None
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): tensors[name] for name, owner in owners.items() if owner == prefix}
        converted = convert(dict(inside), prefix)
        found = converted or found
        result |= {prefix + name: value for name, value in (converted.tensors if converted else inside).items()}
    return found and replace(found, tensors=result)


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> Tensors:
    """Return the tensors by their new names."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        for pattern, new in rules:
            if new is not None:
                name = re.sub(pattern, new, name)
            elif re.search(pattern, name):
                break
        else:
            renamed[name] = value
    return renamed


def join_qkv(tensors: Tensors, split_bias: bool = False) -> None:
    """Join `attn.q`, `attn.k` and `attn.v` to `attn.qkv`, in place. A missing bias is zero if another one exists.

    With `split_bias`, biases become timm's `q_bias` and `v_bias`.
    """
    for name in [name for name in tensors if name.endswith("attn.q.weight")]:
        stem = name.removesuffix("q.weight")
        tensors[f"{stem}qkv.weight"] = torch.cat([tensors.pop(f"{stem}{part}.weight") for part in "qkv"])
        biases = {part: value for part in "qkv" if (value := tensors.pop(f"{stem}{part}.bias", None)) is not None}
        if split_bias and "k" not in biases:
            tensors |= {f"{stem}{part}_bias": value for part, value in biases.items()}
        elif biases:
            zero = torch.zeros_like(next(iter(biases.values())))
            tensors[f"{stem}qkv.bias"] = torch.cat([biases.get(part, zero) for part in "qkv"])


def depth_of(tensors: Iterable[str], pattern: str = r"blocks\.(\d+)\.") -> int:
    """Return the number of blocks (or of what else `pattern` counts from 0) in the names of tensors."""
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def ratio(whole: int, part: int) -> float:
    """Return a quotient q with `int(part * q) == whole`: rounding can make whole / part too small."""
    exact = whole / part
    return exact if int(part * exact) == whole else (whole + 0.5) / part


def sizes_of(tensors: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    """Return timm's arguments for the sizes of a model with blocks of one width."""
    width, *_, patch = tensors["patch_embed.proj.weight"].shape
    sizes = {"patch_size": patch, "embed_dim": width, "depth": depth_of(tensors), "num_heads": heads}
    return sizes | {"mlp_ratio": ratio(tensors["blocks.0.mlp.fc2.weight"].shape[1], width)}


def is_square(count: int) -> bool:
    """Return whether a number of patches can be that of a square grid."""
    return count > 0 and math.isqrt(count) ** 2 == count


def image_settings(normalisation: Mapping[str, Any], interpolation: str, size: int, resized: int) -> dict[str, Any]:
    """Return the settings of a centre crop of `size` pixels out of `resized`, as in config.json."""
    crop = size / resized
    crop = crop if math.floor(size / crop) == resized else size / (resized + 0.5)  # timm rounds size / crop_pct down
    return {**normalisation, "interpolation": interpolation, "crop_pct": crop, "crop_mode": "center"}


def plain_vit(
    tensors: Mapping[str, Tensor], heads: int | None = None, act: str = "gelu", eps: float = 1e-6, size: Any = None
) -> Converted:
    """Return a model of timm's VisionTransformer, by its tensors under timm's names.

    `act` is timm's name of the activation, `eps` that of the norms, `size` the images' height and width in
    pixels if these differ. Without `heads`, there is a note if their number is a guess.
    """
    patches, fc1, notes = tensors["patch_embed.proj.weight"], tensors["blocks.0.mlp.fc1.weight"], list[str]()
    width, patch, head = int(patches.shape[0]), int(patches.shape[-1]), tensors.get("head.weight")
    tensors = {name: value.reshape(1, -1, width) if name in TOKENS else value for name, value in tensors.items()}
    if any("pre_logits" in name for name in tensors) or (head is not None and head.shape[1] != width):
        tensors = rename(tensors, ((r"^head\.|pre_logits", None),))
        notes.append(NO_HEAD)
    class_token, scaled, pooled = (name in tensors for name in ("cls_token", "blocks.0.ls1.gamma", "attn_pool.latent"))
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    places = tensors["pos_embed"].shape[1]
    if registers and is_square(places - 1):  # DINOv2: registers have no positions, and in timm no prefix token has
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"], places = tensors["pos_embed"][:, 1:], places - 1
    if not {"patch_embed.proj.bias", "norm_pre.weight"} & tensors.keys():
        tensors["patch_embed.proj.bias"] = torch.zeros(width)
    side = math.isqrt(places if is_square(places) else max(0, places - class_token - registers))
    sizes = sizes_of(tensors, heads or VIT_HEADS.get(width) or max(1, width // 64))
    gated = fc1.shape[0] != tensors["blocks.0.mlp.fc2.weight"].shape[1]
    # timm's norms have an epsilon of 1e-6, those of CLIP 1e-5. Smaller ones change tokens by less than 1e-4.
    used = 1e-5 if eps > 3e-6 else 1e-6
    if abs(eps - used) > 1e-6:
        notes.append(f"the epsilon of its norms is {eps:g}, and that of timm's model {used:g}: P can differ")
    family = "clip_224" if used > 1e-6 else "siglip_224" if pooled else "dinov2" if scaled else "224"
    family = f"{'reg4_' * (family == 'dinov2' and registers > 0)}{family}"
    names = [f"vit_{VIT_SIZES.get(width)}_patch{patch}", "vit_base_patch16", "vit_base_patch14"]
    architecture = next(filter(timm.is_model, (f"{name}_{family}" for name in names)))
    arguments: dict[str, Any] = sizes | {
        "mlp_ratio": ratio(fc1.shape[0], width),  # of SwiGLU both halves
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "class_token": class_token,
        "reg_tokens": registers,
        "pre_norm": "norm_pre.weight" in tensors,
        "final_norm": "norm.weight" in tensors,
        "global_pool": "token" if class_token else "map" if pooled else "avg",
        "fc_norm": False,
        "act_layer": "silu" if gated else act,
        "init_values": 1e-5 if scaled else None,
        "no_embed_class": is_square(places),  # else prefix tokens have positions
        "img_size": size if isinstance(size, list) else side * patch,
    }
    if heads is None and not (width in VIT_SIZES or width in VIT_HEADS):
        notes.append(f"the number of heads is not in the file: {arguments['num_heads']}, width / 64 (--heads)")
    # timm has no argument for SwiGLU, which this model has
    architecture = f"vit_giant_patch14_{family}" if gated else architecture
    return Converted(tensors, {"architecture": architecture, "model_args": arguments}, notes)
