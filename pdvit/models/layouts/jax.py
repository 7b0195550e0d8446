"""Vision transformers of Google's JAX code, the original and AugReg, in `.npz` files of NumPy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdvit.errors import UserError
from pdvit.models.layouts.conversion import (
    HALF,
    IN_MEMORY,
    Converted,
    Rules,
    Tensors,
    image_settings,
    join_qkv,
    plain_vit,
    rename,
)

BLOCK = "Transformer/encoderblock_0/"
RULES: Rules = (
    (r"^(?:opt/target|params)/", ""),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^cls$", "cls_token"),
    (r"^(?:Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_\d/(q|k|v)(?:uery|ey|alue)/", r"/attn/\1/"),
    (r"/MultiHeadDotProductAttention_\d/out/", "/attn/proj/"),
    (r"/MlpBlock_\d/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_\d/Dense_1/", "/mlp/fc2/"),
    (r"/(?:kernel|scale)$", "/weight"),
    (r"/", "."),
)


def read(file: Path) -> Tensors:
    """Return the arrays of an `.npz` file; any error of NumPy, and ValueError for arrays of pickled objects."""
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind == "f"}


def convert(tensors: Tensors, config: Mapping[str, Any], folder: Path, where: str) -> Converted | None:
    """Return a model of Google's code under timm's names; None if it is none. Raises UserError for a hybrid."""
    if not any(BLOCK in name for name in tensors):
        return None
    if any("conv_root/" in name for name in tensors):
        raise UserError("a vision transformer on a ResNet, of JAX, can't be converted here", where, IN_MEMORY)
    renamed = rename(tensors, RULES)
    heads = renamed["blocks.0.attn.q.weight"].shape[1]
    renamed = {name: _transposed(name, value) for name, value in renamed.items()}
    join_qkv(renamed)
    found = plain_vit(renamed, heads)
    notes = ["a file of JAX does not contain its preprocessing: mean and std 0.5, bicubic, a crop of 0.9 as for AugReg"]
    notes += ["GELU is timm's, exact; that of Flax is the tanh approximation", *found.notes]
    images = image_settings(HALF, "bicubic", 9, 10)
    return Converted(found.tensors, found.config | {"pretrained_cfg": images}, notes)


def _transposed(name: str, value: Tensor) -> Tensor:
    """Return an array of Flax in torch's order: outputs before inputs, and the heads of attention joined."""
    if name.endswith((".q.weight", ".k.weight", ".v.weight")):  # (inputs, heads, outputs of each)
        value = value.flatten(1)
    elif name.endswith(".proj.weight") and value.ndim == 3:  # (heads, inputs of each, outputs)
        value = value.flatten(0, 1)
    elif name.endswith(".bias"):
        return value.flatten()
    return value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value
