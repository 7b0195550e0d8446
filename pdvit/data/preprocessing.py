"""Decoding image files to uint8 tensors, with the random crop of training."""

import errno
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from pdvit.config.schema import CROP_MODES, INTERPOLATIONS, DataConfig
from pdvit.data.augment.crop import crop_pixels
from pdvit.data.bad_images import BadImage, Sample
from pdvit.data.sources import LazySplit
from pdvit.errors import UserError

if TYPE_CHECKING:
    from pdvit.data.augment.pipeline import Augmentation

Result = TypeVar("Result")
# Files that are open at once: all crops of so many are drawn together.
OPEN = 32
# What the machine runs short of.
SHORT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
Keys = list[tuple[int, int]]


@dataclass(frozen=True)
class Preprocessing:
    """How images become the model's input: side in pixels, centre crop, interpolation, mean and standard deviation."""

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if (value := getattr(self, name)) not in known:
                flag = f"data.{name} (--{name.replace('_', '-')})"
                raise UserError(
                    f"the {name} '{value}' of the model is not one that pdvit has",
                    flag,
                    f"choose from: {', '.join(known)}",
                )

    @classmethod
    def for_model(cls, model: nn.Module) -> "Preprocessing":
        """Return what a timm model expects: its own size, and what its configuration says of the rest.

        Raises UserError where the size is not square, and for an interpolation or a way to crop that pdvit has not.
        """
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

    def evaluation(self) -> v2.Compose:
        """Return the transform of a held-out image: short side scaled, centre cropped, uint8 `(3, size, size)`.

        A model that was trained on squashed images gets both sides scaled instead, as timm does.
        """
        side = math.floor(self.size / self.crop_pct)  # rounded as timm does, so that its transform is the same
        sides = (side, side) if self.crop_mode == "squash" else side
        resize = v2.Resize(sides, interpolation=self._mode(), antialias=True)
        return v2.Compose([resize, v2.CenterCrop(self.size), v2.PILToTensor()])

    def _mode(self) -> v2.InterpolationMode:
        return v2.InterpolationMode(self.interpolation)

    def fill(self, device: torch.device) -> Tensor:
        """Return the levels of the mean colour, `(3, 1, 1)`: what an operation moves in from outside."""
        return _on_device(self.mean, device).round()

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


@contextmanager
def strict_decoders() -> Iterator[None]:
    """Make Pillow's warning of a decompression bomb an error, before the pixels are made."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        yield


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
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()  # instead of `convert`, which would copy it
        return image


def attempt(split: LazySplit, index: int, read: Callable[..., Result], *arguments: Any) -> Result | BadImage:
    """Return `read(*arguments)`, which reads this image of the split, or say why it can't be read."""
    try:
        return read(*arguments)
    except UnidentifiedImageError:
        return BadImage(split.name(index), "not an image")
    except Exception as error:  # decoders raise nearly anything on a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in SHORT:
            raise  # the image has nothing to do with it
        return BadImage(split.name(index), str(error) or type(error).__name__)


def try_read(split: LazySplit, index: int) -> Image.Image | BadImage:
    """Decode an image of a split, or say why it can't be decoded."""
    with strict_decoders():
        return attempt(split, index, lambda: read_image(split.open(index)))


class FileImages(Dataset[Sample]):
    """The images of a split as a torch data set that is read in batches, of keys (epoch, index)."""

    def __init__(self, split: LazySplit, transform: Callable[[Image.Image], Tensor]) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: Keys) -> list[Sample]:
        """Return for each key the uint8 image (or why there is none), its class and its index."""
        with strict_decoders():
            parts = [self._read(keys[at : at + OPEN]) for at in range(0, len(keys), OPEN)]
        images = [image for part in parts for image in part]
        labels = self.split.labels
        return [(image, int(labels[index]), index) for image, (_, index) in zip(images, keys, strict=True)]

    def _read(self, keys: Keys) -> list[Tensor | BadImage]:
        return [attempt(self.split, index, self._whole, index) for _, index in keys]

    def _whole(self, index: int) -> Tensor:
        return self.transform(read_image(self.split.open(index)))


class TrainingImages(FileImages):
    """Images with the random crop of training; what else is done to them happens in batch.

    All keys of a batch are of one epoch.
    """

    def __init__(self, split: LazySplit, augmentation: "Augmentation") -> None:
        super().__init__(split, pixels_of)
        self.augmentation, self.how = augmentation, augmentation.preprocessing

    def _read(self, keys: Keys) -> list[Tensor | BadImage]:
        opened = [attempt(self.split, index, self.split.open, index) for _, index in keys]
        sizes = [(1, 1) if isinstance(image, BadImage) else image.size for image in opened]
        widths, heights = torch.tensor(sizes).unbind(1)
        (epoch,) = {epoch for epoch, _ in keys}
        boxes = self.augmentation.boxes(epoch, torch.tensor([index for _, index in keys]), heights, widths)
        return [
            image if isinstance(image, BadImage) else attempt(self.split, index, self._cut, image, box)
            for (_, index), image, box in zip(keys, opened, boxes.tolist(), strict=True)
        ]

    def _cut(self, image: Image.Image, box: list[int]) -> Tensor:
        """Cut the box out of an opened image, and decode no more of it than is needed.

        A JPEG whose crop is at least twice, four or eight times the input is decoded at that fraction of its size; the
        edges of the crop then lie on whole pixels of what was decoded.
        """
        width, height = image.size
        coarser = min(box[2], box[3]) // self.how.size
        if coarser > 1:
            image.draft(None, (width // coarser, height // coarser))
        step = round(width / image.size[0])
        scaled = (box[0] / step, box[1] / step, box[2] / step, box[3] / step)
        return crop_pixels(np.asarray(read_image(image)), scaled, self.how.size, self.how.interpolation)


def pixels_of(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 `(3, H, W)`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
