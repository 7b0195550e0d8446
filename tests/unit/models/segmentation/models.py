"""Small segmentation models, built once for each configuration."""

import copy
from typing import Any

import torch
from torch import Tensor

from pdvit.config import Config
from pdvit.config.schema import DiversityConfig, ModelConfig, SegmentConfig
from pdvit.models.segmentation.segmenter import Segmenter, build_segmenter

NONE = DiversityConfig(preset="none", cosine=0.0, contrastive=0.0, mixing=0.0)
VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
SWIN_SIZES = {"embed_dim": 8, "depths": [2, 1, 1, 2], "num_heads": [1, 2, 2, 4], "window_size": 4}
# Small forms of one model per family, by the settings that make them small.
FAMILIES: dict[str, dict[str, Any]] = {
    VIT: {"depth": 4, "width": 16, "heads": 2, "patch_size": 8},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "width": 16, "heads": 2},
    "vit_small_patch14_dinov2": {"depth": 5, "width": 16, "heads": 2},
    "vit_small_patch16_dinov3": {"depth": 2, "width": 24, "heads": 2},
    "beit_base_patch16_224": {"depth": 4, "width": 16, "heads": 2},
    "cait_xxs24_224": {"depth": 4, "width": 16, "heads": 2},
    "xcit_nano_12_p16_224": {"depth": 4, "width": 16, "heads": 2},
    SWIN: {"args": SWIN_SIZES},
    "swinv2_tiny_window8_256": {"args": SWIN_SIZES},
    "hiera_tiny_224": {"args": {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 2]}},
    "pvt_v2_b0": {"args": {"depths": [1, 1, 1, 2], "embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2]}},
    "convnext_atto": {"args": {"depths": [1, 1, 1, 2], "dims": [8, 8, 16, 16]}},
    "twins_svt_small": {"args": {"depths": [1, 1, 1, 2], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 2, 2, 2]}},
    "volo_d1_224": {},
}


def config(
    name: str = VIT,
    head: str = "upernet",
    crop: int | None = 32,
    model: dict[str, Any] | None = None,
    diversity: DiversityConfig = NONE,
    **segment: Any,
) -> Config:
    section = SegmentConfig(head=head, crop=crop, **{"width": 16} | segment)
    sizes = FAMILIES.get(name, {}) if model is None else model
    return Config(model=ModelConfig(name=name, drop_path=0.0, **sizes), diversity=diversity, segment=section)


BUILT: dict[tuple[str, int], Segmenter] = {}


def build(*arguments: Any, classes: int = 5, **options: Any) -> Segmenter:
    """Return a model of its own; those of equal settings are built once."""
    settings = config(*arguments, **options)
    key = (repr(settings), classes)
    if key not in BUILT:
        torch.manual_seed(0)
        BUILT[key] = build_segmenter(settings, classes)
    return copy.deepcopy(BUILT[key])


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.linspace(-1, 1, count * 3 * height * width).sin().view(count, 3, height, width)
