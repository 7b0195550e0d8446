"""Sizes of a model by its tensors under timm's names, and the normalisation of published weights."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import timm
from torch import Tensor

from pdvit.models.layouts.conversion import Converted

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
# Sizes in the names of timm's plain models by width, and the heads of widths where these are not width / 64.
VIT_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
VIT_HEADS = {1280: 16, 1408: 16, 1664: 16}


def depth_of(tensors: Iterable[str], pattern: str = r"blocks\.(\d+)\.") -> int:
    """Return the number of blocks (or of what else `pattern` counts from 0) in the names of tensors."""
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def ratio(whole: int, part: int) -> float:
    """Return a quotient q with `int(part * q) == whole`: rounding can make whole / part too small."""
    exact = whole / part
    return exact if int(part * exact) == whole else (whole + 0.5) / part


def crop_fraction(size: int, resized: int) -> float:
    """Return timm's crop_pct of a crop of `size` pixels out of `resized`: timm rounds `size / crop_pct` down."""
    exact = size / resized
    return exact if math.floor(size / exact) == resized else size / (resized + 0.5)


def plain_vit(tensors: Mapping[str, Tensor], **known: Any) -> Converted:
    """Return a plain model of timm by its tensors under timm's names.

    Known settings are `heads`, `act` (timm's name of the activation), `eps` of the norms, `size` (the side of the
    images in pixels, or height and width), and `label`, the first word of the architecture's name.
    """
    patch_embed, fc1 = tensors["patch_embed.proj.weight"], tensors["blocks.0.mlp.fc1.weight"]
    width, patch = int(patch_embed.shape[0]), int(patch_embed.shape[-1])
    class_token, scaled, pooled = (name in tensors for name in ("cls_token", "blocks.0.ls1.gamma", "attn_pool.latent"))
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    gated = fc1.shape[0] != tensors["blocks.0.mlp.fc2.weight"].shape[1]
    # timm's norms have an epsilon of 1e-6, those of CLIP 1e-5. Smaller ones change tokens by less than 1e-4.
    family = "clip_224" if known.get("eps", 1e-6) > 3e-6 else "siglip_224" if pooled else "dinov2" if scaled else "224"
    family, label = f"{'reg4_' * (scaled and registers > 0)}{family}", known.get("label", "vit")
    names = [
        f"{label}_{VIT_SIZES.get(width)}_patch{patch}_{family}",
        *(f"vit_base_patch{n}_{family}" for n in (16, 14)),
    ]
    arguments: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth_of(tensors),
        "num_heads": known.get("heads") or VIT_HEADS.get(width) or max(1, width // 64),
        "mlp_ratio": ratio(fc1.shape[0], width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "class_token": class_token,
        "reg_tokens": registers,
        "pre_norm": "norm_pre.weight" in tensors,
        "global_pool": "token" if class_token else "map" if pooled else "avg",
        "fc_norm": False,
        "act_layer": "silu" if gated else known.get("act", "gelu"),
    }
    if scaled:
        arguments["init_values"] = 1e-5
    if "pos_embed" in tensors:
        places, size = tensors["pos_embed"].shape[1], known.get("size")
        counts = {places - class_token - registers: False, places: True}  # prefix tokens have positions, or none
        grids = [[side // patch for side in (size if isinstance(size, list) else (size, size))]] if size else []
        grids += [[math.isqrt(max(0, count))] * 2 for count in counts]
        grid = next((grid for grid in grids if math.prod(grid) in counts), [0, 0])
        arguments["no_embed_class"] = counts.get(math.prod(grid), False)
        if any(grid):  # else a later check names the number of patches
            arguments["img_size"] = grid[0] * patch if grid[0] == grid[1] else [side * patch for side in grid]
    published = known.get("heads") or width in VIT_SIZES or width in VIT_HEADS
    notes = [] if published else [f"the number of heads is not in the file: {arguments['num_heads']}, width / 64"]
    # timm has no argument for SwiGLU, which this model has
    architecture = f"vit_giant_patch14_{family}" if gated else next(filter(timm.is_model, names))
    return Converted(dict(tensors), {"architecture": architecture, "model_args": arguments}, notes)
