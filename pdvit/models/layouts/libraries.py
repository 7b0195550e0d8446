"""Finds the library of a checkpoint and gives its tensors timm's names; files of research code and training engines.

Research code is that of MoCo v3, I-JEPA and DINOv2; engines wrap blocks or split them into chunks.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdvit.errors import UserError
from pdvit.files import reading
from pdvit.models.layouts import conversion, open_clip, torchvision, transformers
from pdvit.models.layouts.conversion import Converted, Rules, Tensors, rename

# Modules in the middle of a name: of torch.compile, FSDP and activation checkpointing.
WRAPPERS: Rules = ((r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", ""),)
ADAPTERS = re.compile(r"(?:^|\.)(?:lora_\w+|hada_\w+|base_layer|ia3_l|vera_\w+|oft_r)(?:\.|$)")
QUANTISED = re.compile(r"\.(?:SCB|absmax|quant_map|quant_state\..+|qweight|qzeros|weight_scale\w*|zero_point)$")
CHUNK = re.compile(r"^blocks\.(\d+)\.(\d+)\.")
MOCO: Rules = ((r"^head\.\d+\.", None),)  # its projection
DINOV2: Rules = (
    (r"^mask_token$", None),
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
MOCO_HEADS = {384: 12}  # its small model has 12 heads, as the base model
NOTE = "the file does not contain its preprocessing: mean and std are ImageNet's, as in the code of {}, the rest timm's"


def to_timm(tensors: Tensors, config: Mapping[str, Any], folder: Path, where: str) -> Converted:
    """Return a checkpoint with timm's names, converted if it is of another library.

    `config` is the table of config.json, `folder` where files beside the weights are. Raises UserError if timm has no
    such model, a file beside the weights is missing, or the weights are quantised or an adapter.
    """
    _refuse_unmerged(tensors, where)
    tensors = rename(tensors, WRAPPERS)
    with reading(where, conversion.IN_MEMORY, "its weights can't be converted to a model of timm"):
        for convert in (transformers.convert, open_clip.convert, torchvision.convert, _research):
            if (converted := convert(tensors, config, folder, where)) is not None:
                return converted
    return Converted(tensors, dict(config))


def _refuse_unmerged(tensors: Tensors, where: str) -> None:
    """Raise UserError if the tensors are those of an adapter, or quantised."""
    if name := next(filter(ADAPTERS.search, tensors), None):
        model = "model" if any("base_layer" in it for it in tensors) else "PeftModel.from_pretrained(base, ADAPTER)"
        tip = f"merge it before it is saved, with peft: {model}.merge_and_unload().save_pretrained(FOLDER)"
        raise UserError(f"it holds an adapter (LoRA or the like) that is not merged: {name}", where, tip)
    narrow = (name for name, value in tensors.items() if value.is_floating_point() and value.element_size() == 1)
    if name := next(filter(QUANTISED.search, tensors), None) or next(narrow, None):
        tip = "dequantise it: in transformers, model.dequantize().save_pretrained(FOLDER); or use the original weights"
        raise UserError(f"its weights are quantised: {name} is {tensors[name].dtype}", where, tip)


def _research(tensors: Tensors, config: Mapping[str, Any], folder: Path, where: str) -> Converted | None:
    """Return a file of MoCo v3, I-JEPA or DINOv2 with its architecture and timm's names; None if it is none."""
    jepa = any("target_encoder." in name for name in tensors)

    def convert_one(inside: Tensors, prefix: str) -> Converted | None:
        inside, heads = _without_chunks(inside), None
        if prefix.endswith(("base_encoder.", "momentum_encoder.")):
            code, rules = "MoCo v3", MOCO
            heads = MOCO_HEADS.get(len(inside["patch_embed.proj.weight"]))
        elif {"mask_token", "blocks.0.ls1.gamma", "pos_embed"} <= inside.keys():  # DINOv3 has no positions
            code, rules = "DINOv2", DINOV2
        elif jepa and "cls_token" not in inside:
            code, rules = "I-JEPA", ()
        else:
            return None
        found = conversion.plain_vit(rename(inside, rules), heads)
        return Converted(found.tensors, found.config, [*found.notes, NOTE.format(code)])

    found = conversion.convert_each(tensors, r"patch_embed\.proj\.weight", convert_one)
    if found is None or "architecture" in config:
        return found and Converted(found.tensors, dict(config))
    images = {**conversion.IMAGENET, **(config.get("pretrained_cfg") or {})}
    arguments = {**(config.get("model_args") or {}), **found.config["model_args"]}
    settings = {**config, **found.config, "model_args": arguments, "pretrained_cfg": images}
    return Converted(found.tensors, settings, found.notes)


def _without_chunks(tensors: Tensors) -> Tensors:
    """Return DINOv2's blocks without the number of their chunk; blocks are numbered through all chunks."""
    blocks = {match.groups() for name in tensors if (match := CHUNK.match(name))}
    if "cls_token" not in tensors or len({block for _, block in blocks}) < len(blocks):  # as those of Twins
        return tensors
    return rename(tensors, ((CHUNK.pattern, r"blocks.\2."),))
