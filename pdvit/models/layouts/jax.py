"""Vision transformers of Google's JAX code, the original and AugReg: `.npz` files, which timm reads."""

from pathlib import Path
from typing import Any

import numpy as np

from pdvit.models.build import build_model
from pdvit.models.layouts import conversion
from pdvit.models.layouts.conversion import Converted

HEADS = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
NOTES = [
    "a file of JAX does not contain its preprocessing: mean and std 0.5, bicubic, a crop of 0.9 as for AugReg",
    "GELU is timm's, exact; that of Flax is the tanh approximation",
]


def read(file: Path) -> Converted:
    """Return the model of an `.npz` file; any error of NumPy and timm, also if an array holds pickled objects."""
    with np.load(file, allow_pickle=False) as arrays:
        shapes = {name: arrays[name].shape for name in arrays.files}
    prefix = next((name.removesuffix(HEADS) for name in shapes if name.endswith(HEADS)), None)
    if prefix is None or any("conv_root/" in name for name in shapes):
        raise ValueError("it is no plain vision transformer of Google's JAX code")
    side, _, _, width = shapes[f"{prefix}embedding/kernel"]
    hidden = f"{prefix}pre_logits/bias" in shapes  # before the classifier: timm would leave out this layer alone
    places = shapes[f"{prefix}Transformer/posembed_input/pos_embedding"][1]
    arguments: dict[str, Any] = {
        "img_size": round((places - 1) ** 0.5) * side,
        "patch_size": side,
        "embed_dim": width,
        "depth": conversion.depth_of(shapes, rf"{prefix}Transformer/encoderblock_(\d+)/"),
        "num_heads": shapes[f"{prefix}{HEADS}"][1],
        "mlp_ratio": conversion.ratio(shapes[f"{prefix}Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"][0], width),
        "num_classes": 0 if hidden else shapes.get(f"{prefix}head/bias", (0,))[0],
    }
    model: Any = build_model("vit_base_patch16_224", arguments, str(file))
    model.load_pretrained(file)
    images = conversion.image_settings(conversion.HALF, "bicubic", 9, 10)
    config = {"architecture": "vit_base_patch16_224", "model_args": arguments, "pretrained_cfg": images}
    return Converted(model.state_dict(), config, NOTES + [conversion.NO_HEAD] * hidden)
