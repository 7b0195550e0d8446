"""Training transforms of images and masks: MMSegmentation's chain, made of torchvision's transforms.

Scale, crop, flip, colours, in this order. Images smaller than the crop are padded right and bottom; the padding is set
after the normalization, to 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pdvit.config.schema import SegmentConfig
from pdvit.data.images import pixels_of
from pdvit.data.masks.split import Pair
from pdvit.data.masks.table import IGNORED, OUTSIDE
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.randomness import fold

# Longest side as a multiple of the short side; MMSegmentation: 2048 to 512.
LONGEST = 4
RETRIES = 10


class PhotometricDistort(v2.RandomPhotometricDistort):  # type: ignore[misc]
    """Random brightness, contrast, saturation and hue, with MMSegmentation's range of hue; channels stay in order."""

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factors."""
        params: dict[str, Any] = super().make_params(flat_inputs)
        return params | {"channel_permutation": None}


def draw_crop(mask: Tensor, side: int, max_fraction: float) -> tuple[int, int, int, int]:
    """Draw a crop of a mask `(H, W)`, again up to 10 times if one class covers too much: top, left, height, width."""
    rows, columns = mask.shape
    height, width = min(side, rows), min(side, columns)
    for tries_left in reversed(range(RETRIES + 1)):
        top, left = (int(torch.randint(room + 1, ())) for room in (rows - height, columns - width))
        if not tries_left or (height, width) == (rows, columns) or max_fraction == 1:
            break
        if balanced(mask[top : top + height, left : left + width], max_fraction):
            break
    return top, left, height, width


def balanced(mask: Tensor, max_fraction: float) -> bool:
    """Whether a mask has at least two classes, each below this fraction of the pixels that have a class."""
    counts = mask.flatten().bincount()[:OUTSIDE]
    return int((counts > 0).sum()) > 1 and bool(counts.max() < max_fraction * counts.sum())


@dataclass(frozen=True)
class TrainingTransform:
    """From an image and its mask to a training crop, as a function of (seed, epoch, index)."""

    segment: SegmentConfig
    preprocessing: Preprocessing
    crop: int
    flip: float
    seed: int

    def __call__(self, pair: Pair, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return the crop, uint8 `(3, crop, crop)`, and its mask, with 254 outside of the image."""
        parts = tv_tensors.Image(pixels_of(pair[0])), tv_tensors.Mask(pair[1])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the process generator
            torch.default_generator.manual_seed(fold(self.seed, epoch, index))  # that of the CPU alone
            size, mode = self.draw_size(*pair[1].shape), v2.InterpolationMode(self.preprocessing.interpolation)
            parts = tuple(functional.resize(part, size, mode, antialias=True) for part in parts)
            box = draw_crop(parts[1].as_subclass(Tensor), self.crop, self.segment.max_share)
            parts = v2.RandomHorizontalFlip(self.flip)(*(functional.crop(part, *box) for part in parts))
            image, mask = PhotometricDistort()(*parts) if self.segment.photometric else parts
        padding = [0, 0, self.crop - mask.shape[-1], self.crop - mask.shape[-2]]
        image, mask = functional.pad(image, padding), functional.pad(mask, padding, fill=OUTSIDE)
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def draw_size(self, height: int, width: int) -> list[int]:
        """Draw the short side, and limit the long one; a thin strip keeps at least one pixel."""
        target = self.segment.short_side or min(height, width)
        least, most = (max(1, round(factor * target)) for factor in self.segment.jitter)
        side = least + int(torch.randint(most - least + 1, ()))
        scale = min(side / min(height, width), LONGEST * most / max(height, width))
        return [max(1, int(height * scale)), max(1, int(width * scale))]


@dataclass(frozen=True)
class EvaluationTransform:
    """Scales an image to the short side of evaluation; the mask keeps its size."""

    short_side: int | None
    interpolation: str

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the image, uint8 `(3, h, w)`."""
        pixels = pixels_of(image)
        if self.short_side is None:
            return pixels
        height, width = pixels.shape[-2:]
        short, long = self.short_side, self.short_side * max(height, width) // min(height, width)
        if long > (longest := LONGEST * short):
            short, long = max(1, longest * short // long), longest
        size = [short, long] if height < width else [long, short]
        resized: Tensor = functional.resize(pixels, size, v2.InterpolationMode(self.interpolation), antialias=True)
        return resized


def normalise_and_pad(images: Tensor, masks: Tensor, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Normalize a batch `(B, 3, H, W)` and make targets `(B, H, W)` of masks: 0 and 255 outside of the images."""
    outside = masks == OUTSIDE
    targets = masks.long().masked_fill_(outside, IGNORED)
    return preprocessing.normalise(images).masked_fill_(outside[:, None], 0.0), targets
