"""torchvision: state dicts of `vit_*` and `swin_*`, whose models are found by the shapes of their tensors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdvit.models.layouts import conversion
from pdvit.models.layouts.conversion import Converted, Rules, Tensors, convert_each, rename

VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^heads\.head\.", "head."),
)
SWIN: Rules = (
    (r"relative_position_index$|relative_coords_table$", None),
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)
# Short side in pixels before the crop, in torchvision's published weights, by width and depth.
SWIN_RESIZED = {(96, 12): (232, 260), (96, 24): (246, 260), (128, 24): (238, 272)}
HEADS = (("relative_position_bias_table", 1), ("logit_scale", 0))  # tensor with the number of heads, and its axis
NOTE = "a file of torchvision does not contain its preprocessing: {} as for torchvision's {}"


def convert(tensors: Tensors, config: Mapping[str, Any], folder: Path, where: str) -> Converted | None:
    """Return a model of torchvision under timm's names; None if it is none."""
    found = convert_each(tensors, r"conv_proj\.weight", _vit)
    return found or convert_each(tensors, r"features\.1\.0\.attn\.qkv\.weight", _swin)


def _vit(tensors: Tensors, prefix: str) -> Converted:
    found = conversion.plain_vit(rename(tensors, VIT))
    (_, places, width), patch = found.tensors["pos_embed"].shape, found.config["model_args"]["patch_size"]
    if math.isqrt(places - 1) * patch == 224:  # SWAG's of this size have no border, which the file does not show
        resized = 242 if (width, patch) == (1024, 16) else 256
        images = conversion.image_settings(conversion.IMAGENET, "bilinear", 224, resized)
        note = NOTE.format(f"224 of {resized} pixels, bilinear,", "IMAGENET1K_V1; SWAG_LINEAR has all of 224, bicubic")
    else:
        images = conversion.image_settings(conversion.IMAGENET, "bicubic", 1, 1)
        note = NOTE.format("no border, bicubic,", "IMAGENET1K_SWAG_E2E_V1")
    return Converted(found.tensors, found.config | {"pretrained_cfg": images}, [*found.notes, note])


def _swin(tensors: Tensors, prefix: str) -> Converted:
    second = "features.1.0.attn.logit_scale" in tensors
    window = math.isqrt(math.isqrt(tensors["features.1.0.attn.relative_position_index"].numel()))
    stages = conversion.depth_of(tensors, r"features\.(\d+)\.") // 2
    tensors = rename(tensors, SWIN)
    for stage in range(stages):
        blocks, merging = (rf"^features\.{2 * stage + place}\." for place in (1, 2))
        tensors = rename(tensors, ((blocks, f"layers.{stage}.blocks."), (merging, f"layers.{stage + 1}.downsample.")))
    for name in [name for name in tensors if second and name.endswith("attn.qkv.bias")]:
        query, _, value = tensors.pop(name).chunk(3)  # torchvision sets the bias of keys to zero in each pass
        tensors |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    depths = [conversion.depth_of(tensors, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)]
    tables = [tensors[f"layers.{stage}.blocks.0.attn.{HEADS[second][0]}"] for stage in range(stages)]
    width, *_, patch = tensors["patch_embed.proj.weight"].shape
    size = patch * 2 ** (stages - 1) * window
    arguments = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depths": depths,
        "num_heads": [table.shape[HEADS[second][1]] for table in tables],
        "window_size": window,
        "mlp_ratio": conversion.ratio(len(tensors["layers.0.blocks.0.mlp.fc1.weight"]), width),
    }
    resized = SWIN_RESIZED.get((width, sum(depths)), (size, size))[second]
    images = conversion.image_settings(conversion.IMAGENET, "bicubic", size, resized)
    architecture = "swinv2_tiny_window8_256" if second else "swin_tiny_patch4_window7_224"
    config = {"architecture": architecture, "model_args": arguments, "pretrained_cfg": images}
    return Converted(tensors, config, [NOTE.format(f"{size} of {resized} pixels, bicubic,", "IMAGENET1K_V1")])
