"""Hugging Face transformers: names of tensors (as versions 4 and 5 have them), configuration and image processors."""

import re
from collections.abc import Callable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed

from pdvit.errors import UserError
from pdvit.files import read_json, reading
from pdvit.models.layouts import conversion
from pdvit.models.layouts.conversion import IN_MEMORY, Converted, Rules, Tensors, join_qkv, rename

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second is that of a whole CLIP
COPY = "copy the whole folder, or download it again"
ANCHOR = r"embeddings\.patch_embeddings?\.(?:projection\.)?weight"
ACTIVATIONS = {
    **{name: name for name in ("gelu", "quick_gelu", "relu", "silu")},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
ATTENTION = r"(?<=\d\.)(?:attention\.attention|attention\.self|attention|self_attn)\."
RULES: Rules = (
    (r"relative_position_index$|relative_coords_table$|position_ids$|mask_token$|^pooler\.dense\.", None),
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(?:register_tokens|distillation_token)$", "reg_token"),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^(?:post_)?layernorm\.", "norm."),
    (r"^(?:encoder\.)?relative_position_bias\.", "rel_pos_bias."),
    (r"^encoder\.layers\.(?=\d+\.(?:blocks|downsample)\.)", "layers."),
    (r"^(?:model\.|encoder\.)?layers?\.(?=\d+\.(?!blocks|downsample))", "blocks."),
    (rf"{ATTENTION}(q|k|v)(?:uery|ey|alue|_proj)\.", r"attn.\1."),
    (r"(?<=\d\.)(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
    (rf"{ATTENTION}(?=relative_position_bias|logit_scale|continuous_position)", "attn."),
    (r"(?<=\d\.)(?:attn\.)?relative_position_bias\.", "attn."),
    (r"continuous_position_bias_mlp\.", "cpb_mlp."),
    (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"^head\.(?:attention\.(?:out_)?)?", "attn_pool."),
    (r"^attn_pool\.probe$", "attn_pool.latent"),
    (r"^attn_pool\.layernorm\.", "attn_pool.norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)


def _plain(tensors: Tensors, config: Mapping[str, Any]) -> Converted:
    """Return a model of timm's VisionTransformer."""
    kind, size, notes = config["model_type"], config["image_size"], list[str]()
    if (patches := tensors["patch_embed.proj.weight"]).ndim == 2:  # SigLIP 2 multiplies patches with channels last
        side = isqrt(patches.shape[1] // 3)
        tensors["patch_embed.proj.weight"] = patches.reshape(len(patches), side, side, 3).permute(0, 3, 1, 2)
        notes.append("SigLIP 2 keeps the proportions of an image, and this model takes squares: see --crop-mode")
    for part in ("weight", "bias"):
        if (joined := tensors.pop(f"attn_pool.in_proj_{part}", None)) is not None:
            tensors[f"attn_pool.q.{part}"], tensors[f"attn_pool.kv.{part}"] = joined.tensor_split([len(joined) // 3])
    for name in [name for name in tensors if ".mlp.fc1_g." in name]:
        halves = [tensors.pop(name), tensors.pop(name.replace("fc1_g", "fc1_x"))]
        tensors[name.replace("fc1_g", "fc1")] = torch.cat(halves)
    if kind.startswith("dinov2"):  # as transformers resamples positions in each forward pass
        size = config["size"] or size
        grid, antialias = 2 * [size // patches.shape[-1]], "registers" in kind
        tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], grid, antialias=antialias)
    by_patches = "head.weight" in tensors and kind.startswith(("clip", "siglip"))
    if by_patches:  # the classifier reads the mean of the patches, CLIP's before the norm
        unused = r"^(?:attn_pool|norm)\." if kind.startswith("clip") else r"^attn_pool\."
        tensors = rename(tensors, ((unused, None),))
    join_qkv(tensors)
    activation, eps = ACTIVATIONS[config["hidden_act"]], config["layer_norm_eps"]
    found = conversion.plain_vit(tensors, config["num_attention_heads"], activation, eps, size)
    if by_patches:
        found.config["model_args"]["global_pool"] = "avg"
    if "head_dist.weight" in tensors:
        found.tensors["dist_token"] = found.tensors.pop("reg_token")
        found.config["architecture"], found.config["model_args"]["reg_tokens"] = "deit_base_distilled_patch16_224", 0
    return Converted(found.tensors, found.config, found.notes + notes)


def _beit(tensors: Tensors, config: Mapping[str, Any]) -> Converted:
    join_qkv(tensors, split_bias=True)
    tables = [name for name in tensors if name.endswith("relative_position_bias_table")]
    arguments = conversion.sizes_of(tensors, config["num_attention_heads"]) | {
        "img_size": config["size"] or config["image_size"],
        "use_abs_pos_emb": "pos_embed" in tensors,
        "use_rel_pos_bias": any(name.startswith("blocks.") for name in tables),
        "use_shared_rel_pos_bias": any(name.startswith("rel_pos_bias.") for name in tables),
        "init_values": 0.1 * ("blocks.0.gamma_1" in tensors),
        "global_pool": "token" if "norm.weight" in tensors else "avg",
    }
    if not tensors.keys() & {"norm.weight", "fc_norm.weight"}:  # after the pooling, so that no token changes
        tensors |= {"fc_norm.weight": torch.ones(width := arguments["embed_dim"]), "fc_norm.bias": torch.zeros(width)}
    return _checked(tensors, config, "beit_base_patch16_224", arguments)


def _dinov3(tensors: Tensors, config: Mapping[str, Any]) -> Converted:
    join_qkv(tensors, split_bias=True)
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    tensors = rename(tensors, ((r"\.ls(\d)\.gamma$", r".gamma_\1"), (r"\.fc1_x\.", ".fc1_x." if gated else ".fc1.")))
    arguments = conversion.sizes_of(tensors, config["num_attention_heads"]) | {
        "img_size": config["size"] or config["image_size"],
        "swiglu_mlp": gated,
        "swiglu_align_to": 8 * gated,
        "qkv_bias": "blocks.0.attn.q_bias" in tensors,
        "num_reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "rope_temperature": config["rope_theta"],
        "global_pool": "token",
    }
    return _checked(tensors, config, "vit_base_patch16_dinov3_qkvb", arguments, "silu" if gated else "gelu")


def _swin(tensors: Tensors, config: Mapping[str, Any]) -> Converted:
    second = config["model_type"] == "swinv2"
    join_qkv(tensors, split_bias=second)
    keys = ["patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"]
    keys += ["pretrained_window_sizes" if second else "qkv_bias"]
    arguments = {key: config[key] for key in keys} | {"img_size": config["size"] or config["image_size"]}
    tensors = rename(tensors, ((r"^head\.", "head.fc."),))
    for stage in reversed(range(len(config["depths"]))):  # timm's stages begin with the merging of patches
        tensors = rename(tensors, ((rf"^layers\.{stage}\.downsample", f"layers.{stage + 1}.downsample"),))
    architecture = "swinv2_tiny_window8_256" if second else "swin_tiny_patch4_window7_224"
    return _checked(tensors, config, architecture, arguments)


def _checked(
    tensors: Tensors, config: Mapping[str, Any], name: str, arguments: dict[str, Any], activation: str = "gelu"
) -> Converted:
    """Return a model of timm that has this activation only; raises ValueError for another."""
    if config["hidden_act"] != activation:
        raise ValueError(f"timm has no such model with hidden_act {config['hidden_act']}")
    return Converted(tensors, {"architecture": name, "model_args": arguments})


class ModelType(NamedTuple):
    """A family of models of transformers."""

    convert: Callable[[Tensors, Mapping[str, Any]], Converted]
    images: Mapping[str, Any] = conversion.IMAGENET  # mean and std of its published models
    defaults: Mapping[str, Any] = {}  # of settings that a config.json may leave out


SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_attention_heads": 12}
OPENAI = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12}
MODEL_TYPES = {
    **dict.fromkeys(("deit", "vit_mae", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers"), ModelType(_plain)),
    "vit": ModelType(_plain, conversion.HALF),
    **dict.fromkeys(("clip", "clip_vision_model"), ModelType(_plain, conversion.CLIP, OPENAI)),
    **dict.fromkeys(("siglip", "siglip_vision_model"), ModelType(_plain, conversion.HALF, SIGLIP)),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), ModelType(_plain, conversion.HALF, SIGLIP)),
    **dict.fromkeys(("beit", "data2vec-vision"), ModelType(_beit, conversion.HALF)),
    "dinov3_vit": ModelType(_dinov3),
    **dict.fromkeys(("swin", "swinv2"), ModelType(_swin)),
}


def convert(tensors: Tensors, config: Mapping[str, Any], folder: Path, where: str) -> Converted | None:
    """Return a model of transformers under timm's names; None if it is none. Raises UserError if timm has no such."""
    name, anchors = config.get("model_type"), [name for name in tensors if re.search(rf"(?:^|\.){ANCHOR}$", name)]
    if "architecture" in config or not (anchors or (name and name not in MODEL_TYPES)):
        return None  # also another library's file beside a config.json of transformers
    if name is None:
        what = "its tensors have the names of transformers, whose config.json is not beside it"
        raise UserError(what, where, "put the model's config.json and preprocessor_config.json in the same folder")
    if name not in MODEL_TYPES:
        raise UserError(f"a '{name}' of transformers can't be converted to a model of timm", where, IN_MEMORY)
    images, size, notes = _image_processor(folder)
    convert, published, defaults = MODEL_TYPES[name]
    if not images:
        images = dict(published)
        notes = [f"no {PROCESSORS[0]} found: mean and std are those of published '{name}' models, the rest timm's"]
    settings = {"image_size": None, **defaults, **config, **(config.get("vision_config") or {})}
    settings |= {"model_type": name, "size": size}
    for anchor in anchors:  # a classifier stands beside the model, and in version 5 the blocks of some files too
        prefix = re.sub(rf"{ANCHOR}$", "", anchor)
        outer = re.escape(re.sub(r"[^.]+\.$", "", prefix))
        tensors = rename(
            tensors, ((rf"^{outer}((?:cls_|distillation_)?classifier\.|encoder\.layer\.)", rf"{prefix}\1"),)
        )
    tensors = {key: value for key, value in tensors.items() if value.numel()}  # DINOv3 without registers
    found = conversion.convert_each(tensors, ANCHOR, lambda inside, _: convert(rename(inside, RULES), settings))
    table = config.get("id2label") or {}
    labels = [table.get(str(index)) for index in range(len(table))]
    invented = labels == [f"LABEL_{index}" for index in range(len(labels))]
    named = {} if invented or not labels else {"label_names": labels}
    return found and Converted(found.tensors, {**found.config, **named, "pretrained_cfg": images}, found.notes + notes)


def _image_processor(folder: Path) -> tuple[dict[str, Any], int | None, list[str]]:
    """Return mean, std, crop and interpolation of an image processor, its side in pixels, and notes."""
    file = next((folder / name for name in PROCESSORS if (folder / name).is_file()), None)
    if file is None:
        return {}, None, []
    with reading(file, COPY):
        table = read_json(file)
        table = table.get("image_processor") or table
        # Pixels are divided by 255 before mean and std; another factor, or none, moves into these.
        factor = 255 * table.get("rescale_factor", 1 / 255) if table.get("do_rescale", True) else 255
        mean, std = (table["image_mean"], table["image_std"]) if table.get("do_normalize", True) else ([0] * 3, [1] * 3)
        images: dict[str, Any] = {"mean": [value / factor for value in mean], "std": [value / factor for value in std]}
        edges, crop = table.get("size") or {}, table.get("crop_size") if table.get("do_center_crop") else None
        if isinstance(edges, int):  # of version 4.20 and before: CLIP's is the short side
            edges = {"shortest_edge" if "CLIP" in str(table) else "height": edges}
        resized = edges.get("shortest_edge") or edges.get("height")
        if edges.get("width", resized) != resized:
            raise ValueError(f"it makes images of {resized}x{edges['width']}, and pdvit takes squares")
        size = (crop["height"] if isinstance(crop, dict) else crop) or resized
        images = conversion.image_settings(images, "bicubic", size or 1, resized or size or 1)
        images["crop_mode"] = "squash" if "height" in edges else "center"
        number = table.get("resample", 3)
        images["interpolation"] = RESAMPLE.get(number, "bicubic")
        note = f"resample {number} of {file.name} (of Pillow) is not supported: bicubic is used"
        return images, size, [] if number in RESAMPLE else [note]
