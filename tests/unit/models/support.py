"""Small models with random weights, their files, and checkpoints in one call."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.build import build_model
from pdvit.models.layers import find_layers, watch
from pdvit.models.loading import load_model
from pdvit.models.resolved_checkpoint import ResolvedCheckpoint, resolve_checkpoint

VIT = "test_vit"  # the smallest plain model of timm
SWIN = "swin_tiny_patch4_window7_224"
SMALL_SWIN = {"depths": (1, 1, 1, 2), "num_heads": (1, 2, 2, 4), "img_size": 64, "window_size": 2, "embed_dim": 8}
TINY = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
SMALL = TINY | {"img_size": 32, "num_classes": 3}
CLASSES = ["ant", "bee", "cat"]
DATA = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", "mean": (0.1,) * 3, "std": (0.4,) * 3}


def make(name: str = VIT, seed: int = 0, **arguments: Any) -> nn.Module:
    """Build a model, by default a small plain one, with weights that no initialisation would give."""
    torch.manual_seed(seed)
    sizes = arguments if "depths" in arguments else SMALL | arguments
    model = build_model(name, sizes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model


def tokens_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the patch tokens of every layer."""
    found: dict[str, Tensor] = {}
    with torch.no_grad(), watch(find_layers(model)[1], lambda layer, tokens: found.update({layer: tokens.clone()})):
        model(images)
    return found


def logits(model: nn.Module, *sides: int) -> Tensor:
    height, width = sides or (32, 32)
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 2 * 3 * height * width).view(2, 3, height, width))


def equal(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def original_swin(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a Swin under Microsoft's names: merging at the end of a stage, another name of the head."""
    weights = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        weights[".".join(parts).replace("head.fc.", "head.")] = value
    buffers = {"relative_position_index": torch.zeros(4, 4, dtype=torch.long), "attn_mask": torch.zeros(4, 4, 4)}
    return weights | {f"layers.0.blocks.0.attn.{name}": value for name, value in buffers.items()}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def load(path: str | Path, model_name: str | None = None, weights: str | None = None) -> ResolvedCheckpoint:
    return load_model(resolve_checkpoint(path, model_name, weights))


def refuse(path: str | Path, model_name: str | None = None, weights: str | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path, model_name, weights)
    return caught.value


def on_meta_only(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return a factory that fails if a model would take memory."""

    def created(*arguments: Any, **more: Any) -> nn.Module:
        assert torch.get_default_device().type == "meta"
        return create(*arguments, **more)

    return created


class Touch:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)
