"""Decoding image files to uint8 tensors, with the random crop and flip of training."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from pdvit.config.schema import AugmentConfig, DataConfig
from pdvit.data.bad_images import BadImage, Sample
from pdvit.data.randomness import fold
from pdvit.data.sources import LazySplit
from pdvit.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """How images become the model's input: side in pixels, centre crop, interpolation, mean and standard deviation."""

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"

    @classmethod
    def for_model(cls, model: nn.Module) -> "Preprocessing":
        """Return what a timm model expects: its own size, and what its configuration says of the rest."""
        parts: Any = model
        data = timm.data.resolve_model_data_config(model)
        size = getattr(getattr(parts, "patch_embed", None), "img_size", None)
        height, width = size or data["input_size"][1:]
        if height != width:
            raise UserError(f"the model takes {height}x{width} images", "model.args", "use a square img_size")
        return cls(
            height, data["crop_pct"], data["interpolation"], tuple(data["mean"]), tuple(data["std"]), data["crop_mode"]
        )

    def changed(self, data: DataConfig) -> "Preprocessing":
        """Return it with what the configuration sets."""
        names = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
        return replace(self, **{name: value for name in names if (value := getattr(data, name)) is not None})

    def as_timm(self) -> dict[str, Any]:
        """Return the same in timm's words, for an export."""
        return {
            "input_size": (3, self.size, self.size),
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "crop_mode": self.crop_mode,
        }

    def training(self, augment: AugmentConfig) -> v2.Compose:
        """Return the transform of a training image: random crop and flip, uint8 `(3, size, size)`."""
        crop = v2.RandomResizedCrop(self.size, scale=augment.scale, interpolation=self._mode(), antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(augment.hflip), v2.PILToTensor()])

    def evaluation(self) -> v2.Compose:
        """Return the transform of a held-out image: short side scaled, centre cropped, uint8 `(3, size, size)`.

        A model that was trained on squashed images gets both sides scaled instead, as timm does.
        """
        if self.crop_mode == "squash":
            squash = v2.Resize((self.size, self.size), interpolation=self._mode(), antialias=True)
            return v2.Compose([squash, v2.PILToTensor()])
        side = math.floor(self.size / self.crop_pct)  # rounded as timm does, so that its transform is the same
        resize = v2.Resize(side, interpolation=self._mode(), antialias=True)
        return v2.Compose([resize, v2.CenterCrop(self.size), v2.PILToTensor()])

    def _mode(self) -> v2.InterpolationMode:
        return v2.InterpolationMode(self.interpolation)

    def fit(self, images: Tensor) -> Tensor:
        """Resize uint8 images `(B, 3, H, W)` held in memory to the input size; the same tensor where they fit."""
        if images.shape[-2:] == (self.size, self.size):
            return images
        fitted: Tensor = v2.functional.resize(images, [self.size, self.size], self._mode(), antialias=True)
        return fitted

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 images `(B, 3, H, W)` into the model's float32 input."""
        mean, std = _on_device(self.mean, images.device), _on_device(self.std, images.device)
        return images.float().sub_(mean).div_(std)


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number per channel, for bytes, `(3, 1, 1)`; kept, because each copy to a GPU would wait for it."""
    return torch.tensor(values, device=device)[:, None, None] * 255


def read_image(image: Image.Image) -> Image.Image:
    """Decode an open image as RGB, 16-bit greys scaled to 8, and close it.

    Of an animation it is the first frame; transparency is dropped; the orientation in EXIF is left alone, as by timm.
    Raises whatever its decoder does where it is not sound.
    """
    with image:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):  # Pillow would clip everything above 255 to white
            return image.convert("I").point(lambda value: value * (1 / 257)).convert("RGB")
        return image.convert("RGB")


def try_read(split: LazySplit, index: int) -> Image.Image | BadImage:
    """Decode an image of a split, or say why it can't be decoded."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of possible decompression bombs; as an error it stops before the pixels are made.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", message="Palette images with Transparency")
            return read_image(split.open(index))
    except UnidentifiedImageError:
        return BadImage(split.name(index), "not an image")
    except Exception as error:  # decoders raise nearly anything on a damaged file
        return BadImage(split.name(index), str(error) or type(error).__name__)


class FileImages(Dataset[Sample]):
    """A split as a torch data set whose keys are (epoch, index); epoch -1 means no augmentation."""

    def __init__(self, split: LazySplit, transform: v2.Compose, seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the uint8 image (or why there is none), its class and its index."""
        epoch, index = key
        image = try_read(self.split, index)
        if not isinstance(image, BadImage):
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the process generator
                torch.default_generator.manual_seed(fold(self.seed, epoch + 1, index))  # and not of the GPU
                image = self.transform(image)
        return image, int(self.split.labels[index]), index

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """Return a sample for each key."""
        return [self[key] for key in keys]
