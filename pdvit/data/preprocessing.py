"""Size, crop, interpolation and normalisation of a model's input."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import timm.data
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from pdvit.config import build
from pdvit.config.schema import PREPROCESSING, DataConfig
from pdvit.errors import UserError
from pdvit.models.layers import image_size_of


@dataclass(frozen=True)
class Preprocessing:
    """Image size in pixels, centre crop, interpolation, mean and standard deviation of a model's input."""

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"

    @classmethod
    def for_model(cls, model: nn.Module, data: DataConfig | None = None) -> "Preprocessing":
        """Return the preprocessing of a timm model, with the settings of `data` before its own; raises UserError."""
        own, (height, width) = timm.data.resolve_model_data_config(model), image_size_of(model)
        if height != width:
            raise UserError(f"the model takes {height}x{width} images", "model.args", "use a square img_size")
        values = {name: getattr(data, name, None) or own[name] for name in PREPROCESSING}
        checked = build(("of the model", {"data": values})).data
        return cls(height, **{name: getattr(checked, name) for name in PREPROCESSING})

    def as_timm(self) -> dict[str, Any]:
        """Return it as the configuration of a timm model, for an export."""
        return {"input_size": (3, self.size, self.size)} | {name: getattr(self, name) for name in PREPROCESSING}

    def evaluation(self) -> Any:
        """Return timm's evaluation transform, to uint8."""
        settings = {name: getattr(self, name) for name in ("interpolation", "crop_pct", "crop_mode")}
        return timm.data.create_transform(self.size, normalize=False, **settings)

    def fit(self, images: Tensor) -> Tensor:
        """Resize uint8 images `(B, 3, H, W)` held in memory to the input size; the same tensor where they fit."""
        mode = v2.InterpolationMode(self.interpolation)
        fitted: Tensor = v2.functional.resize(images, [self.size, self.size], mode, antialias=True)
        return fitted

    def normalise(self, images: Tensor, training: bool = False) -> Tensor:
        """Turn uint8 images `(B, 3, H, W)` into the model's float32 input.

        In training on a GPU it is channels last, for convolutions. A model that is analyzed may need the usual layout.
        """
        mean, std = _on_device(self.mean, images.device), _on_device(self.std, images.device)
        layout = torch.channels_last if training and images.is_cuda else torch.preserve_format
        return images.to(torch.float32, memory_format=layout).sub_(mean).div_(std)


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number per channel, for uint8 levels, `(3, 1, 1)`; cached, because a copy to a GPU synchronises."""
    return torch.tensor(values, device=device)[:, None, None] * 255


def copy_to(device: torch.device, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Copy a batch to a device: to a GPU by a stream of its own, while the GPU computes the steps before."""
    if device.type != "cuda":
        return images.to(device), labels.to(device)
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
    current.wait_stream(stream)
    for tensor in (images, labels):
        tensor.record_stream(current)  # else the next copy could take its memory before it is used
    return images, labels


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
