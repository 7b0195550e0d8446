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
        names = [name for name in arrays.files if name.endswith(HEADS)]
        if not names or any("conv_root/" in name for name in arrays.files):
            raise ValueError("it is no plain vision transformer of Google's JAX code")
        prefix = names[0].removesuffix(HEADS)
        side, _, _, width = arrays[f"{prefix}embedding/kernel"].shape
        places = arrays[f"{prefix}Transformer/posembed_input/pos_embedding"].shape[1]
        hidden = arrays[f"{prefix}{HEADS.partition('Multi')[0]}MlpBlock_3/Dense_0/bias"].shape[0]
        arguments: dict[str, Any] = {
            "img_size": round((places - 1) ** 0.5) * side,
            "patch_size": side,
            "embed_dim": width,
            "depth": conversion.depth_of(arrays.files, rf"{prefix}Transformer/encoderblock_(\d+)/"),
            "num_heads": arrays[f"{prefix}{HEADS}"].shape[1],
            "mlp_ratio": conversion.ratio(hidden, width),
            "num_classes": len(arrays[f"{prefix}head/bias"]) if f"{prefix}head/bias" in arrays.files else 0,
        }
    model: Any = build_model("vit_base_patch16_224", arguments, str(file))
    model.load_pretrained(file)
    images = conversion.image_settings(conversion.HALF, "bicubic", 9, 10)
    config = {"architecture": "vit_base_patch16_224", "model_args": arguments, "pretrained_cfg": images}
    return Converted(model.state_dict(), config, NOTES)
