"""open_clip: whole models and visual towers, with `open_clip_config.json` or alone, as `epoch_N.pt`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from pdvit.errors import UserError
from pdvit.files import read_json, reading
from pdvit.models.layouts import conversion
from pdvit.models.layouts.conversion import Converted, Rules, Tensors, rename

CONFIG = "open_clip_config.json"
COPY = "copy the whole folder, or download it again"
RULES: Rules = (
    (r"^proj$|^attn_pool", None),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.ls_(\d)\.gamma$", r".ls\1.gamma"),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def convert(tensors: Tensors, config: Mapping[str, Any], folder: Path, where: str) -> Converted | None:
    """Return the visual tower under timm's names; None if the file is not of open_clip. UserError if it is no ViT."""
    if any(name.endswith("visual.layer1.0.conv1.weight") for name in tensors):
        raise UserError("the visual tower of this CLIP is a ResNet, which has no patches", where, "use a ViT")
    file, table, notes = folder / CONFIG, dict[str, Any](), list[str]()
    prefixes = [match[1] for name in tensors if (match := re.fullmatch(r"((?:.+\.)?)class_embedding", name))]
    # Meta's Perception Encoder, which timm converts, has a probe, or no projection.
    native = any(f"{it}proj" in tensors and f"{it}attn_pool.probe" not in tensors for it in prefixes)
    if file.is_file():
        with reading(file, COPY):
            read = read_json(file)
            table = {**read["model_cfg"], "images": read.get("preprocess_cfg")}
    elif native:
        notes = [f"no {CONFIG} found: mean, std and crop are those of OpenAI's CLIP"]
    else:
        return None
    vision, images = table.get("vision_cfg") or {}, table.get("images") or {}
    anchor, tower = ("class_embedding", _vit) if native else (r"trunk\.patch_embed\.proj\.weight", _timm)
    found = conversion.convert_each(tensors, anchor, lambda inside, _: tower(inside, vision, table))
    mode = images.get("resize_mode") or "shortest"
    if mode == "longest":
        notes.append("open_clip pads images that are not square, and pdvit crops them: see --crop-mode")
    data = conversion.image_settings(conversion.CLIP, "bicubic", 1, 1)
    data |= {key: images[key] for key in ("mean", "std", "interpolation") if images.get(key)}
    data["crop_mode"] = "squash" if mode == "squash" else "center"
    return found and Converted(found.tensors, {**found.config, "pretrained_cfg": data}, found.notes + notes)


def _timm(tensors: Tensors, vision: Mapping[str, Any], table: Mapping[str, Any]) -> Converted:
    """Return a tower of timm, without a projection in the place of its classifier."""
    arguments: dict[str, Any] = {"num_classes": 0}
    if vision.get("timm_proj", "linear") not in ("linear", "mlp"):  # else open_clip keeps the model's own pooling
        arguments["global_pool"] = vision.get("timm_pool", "avg")
    config = {"architecture": vision["timm_model_name"], "model_args": arguments}
    return Converted(rename(tensors, ((r"^trunk\.head\.", None),)), config)


def _vit(tensors: Tensors, vision: Mapping[str, Any], table: Mapping[str, Any]) -> Converted:
    """Return open_clip's own VisionTransformer, or OpenAI's."""
    pooled = any(name.startswith("attn_pool") for name in tensors)
    tensors = rename(tensors, RULES)
    if pooled or vision.get("final_ln_after_pool"):  # the norm is not over tokens
        tensors = rename(tensors, ((r"^norm\.", None),))
    tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
    found = conversion.plain_vit(
        tensors,
        len(tensors["patch_embed.proj.weight"]) // vision.get("head_width", 64) if table else None,
        "gelu_tanh" if tanh else "quick_gelu" if table.get("quick_gelu") else "gelu",
        (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        vision.get("image_size"),
    )
    notes = [*found.notes, *(["its attention pooling has no counterpart in timm: left out"] if pooled else [])]
    if not table:
        quick = found.config["architecture"].replace("_clip_", "_clip_quickgelu_")
        tip = f": --model {quick}" if timm.is_model(quick) else ""
        notes.append(
            f"the file does not contain its activation: GELU by default, OpenAI's and DFN's have QuickGELU{tip}"
        )
    return Converted(found.tensors, found.config, notes)
