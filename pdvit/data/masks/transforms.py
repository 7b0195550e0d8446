"""What is done to training images and their masks: MMSegmentation's chain, of torchvision's transforms.

Scale, crop, flip, colours, in its order. Padding goes right and bottom of what is smaller than the crop; it has no
colour yet, because after the normalisation it is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pdvit.config.schema import SegmentConfig
from pdvit.data.masks.split import Pair
from pdvit.data.masks.table import IGNORED, OUTSIDE
from pdvit.data.preprocessing import Preprocessing, pixels_of
from pdvit.data.randomness import fold

# Longest side, as a multiple of the short side that is wanted; MMSegmentation: 2048 to 512.
LONGEST = 4
RETRIES = 10


class ShortSideJitter(v2.RandomShortestSize):  # type: ignore[misc]
    """Scales to a short side drawn evenly; a thin strip, whose long side is limited, keeps a pixel at least."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        return {"size": tuple(max(1, side) for side in super().make_params(flat_inputs)["size"])}


class CategoryRatioCrop(v2.RandomCrop):  # type: ignore[misc]
    """Random crop `(side, side)`, or what there is of it; drawn again, up to 10 times, where one class covers too much.

    Pixels without a class do not count, and the class of a crop that has no other covers too much.
    """

    def __init__(self, side: int, max_share: float) -> None:
        super().__init__(side)
        self.max_share = max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the crop."""
        (mask,) = (part for part in flat_inputs if isinstance(part, tv_tensors.Mask))
        rows, columns = mask.shape[-2:]
        height, width = (min(side, most) for side, most in zip(self.size, (rows, columns), strict=True))
        for tries_left in reversed(range(RETRIES + 1)):
            top, left = (int(torch.randint(room + 1, ())) for room in (rows - height, columns - width))
            if not tries_left or (height, width) == (rows, columns) or self.max_share == 1:
                break
            if self.fits(mask[..., top : top + height, left : left + width]):
                break
        crop = {"top": top, "left": left, "height": height, "width": width}
        return {"needs_crop": True, "needs_pad": False, "padding": [0, 0, 0, 0]} | crop

    def fits(self, mask: Tensor) -> bool:
        """Tell whether a crop has two classes or more, and none of them covers too much."""
        counts = mask.flatten().bincount()[:OUTSIDE]
        return int((counts > 0).sum()) > 1 and bool(counts.max() < self.max_share * counts.sum())


class PhotometricDistort(v2.RandomPhotometricDistort):  # type: ignore[misc]
    """Random brightness, contrast, saturation and hue, with MMSegmentation's range of hue; channels stay in order."""

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factors."""
        params: dict[str, Any] = super().make_params(flat_inputs)
        return params | {"channel_permutation": None}


@dataclass(frozen=True)
class TrainingTransform:
    """From an image and its mask to a training crop, as a function of (seed, epoch, index)."""

    segment: SegmentConfig
    preprocessing: Preprocessing
    crop: int
    flip: float
    seed: int

    def __call__(self, pair: Pair, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return the crop, uint8 `(3, crop, crop)`, and its mask, with 254 where the image ends."""
        parts = tv_tensors.Image(pixels_of(pair[0])), tv_tensors.Mask(pair[1])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the process generator
            torch.default_generator.manual_seed(fold(self.seed, epoch, index))  # that of the CPU alone
            for transform in (self._jitter(min(pair[1].shape)), *self._after()):
                parts = transform(*parts)
        image, mask = parts
        beyond = [0, 0, self.crop - mask.shape[-1], self.crop - mask.shape[-2]]
        padded = functional.pad(image, beyond), functional.pad(mask, beyond, fill=OUTSIDE)
        return padded[0].as_subclass(Tensor), padded[1].as_subclass(Tensor)

    def _jitter(self, side: int) -> v2.Transform:
        """Return what scales an image of this short side: to a side drawn evenly from the jitter's range."""
        wanted = self.segment.short_side or side
        least, most = (max(1, round(factor * wanted)) for factor in self.segment.jitter)
        mode = v2.InterpolationMode(self.preprocessing.interpolation)
        return ShortSideJitter(range(least, most + 1), LONGEST * most, mode)

    def _after(self) -> list[Callable[..., Any]]:
        after = [CategoryRatioCrop(self.crop, self.segment.max_share), v2.RandomHorizontalFlip(self.flip)]
        return after + [PhotometricDistort()] * self.segment.photometric


@dataclass(frozen=True)
class EvaluationTransform:
    """Scales an image to the short side of evaluation; the mask stays as it is."""

    short_side: int | None
    interpolation: str

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the image, uint8 `(3, h, w)`."""
        pixels = pixels_of(image)
        if self.short_side is None:
            return pixels
        height, width = pixels.shape[-2:]
        short, long = self.short_side, self.short_side * max(height, width) // min(height, width)
        if long > (most := LONGEST * short):
            short, long = max(1, most * short // long), most  # of a thin strip at least a pixel
        size = [short, long] if height < width else [long, short]
        resized: Tensor = functional.resize(pixels, size, v2.InterpolationMode(self.interpolation), antialias=True)
        return resized


def finish(images: Tensor, masks: Tensor, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Normalise a batch `(B, 3, H, W)` and make targets `(B, H, W)` of masks: 0 and 255 beyond the image."""
    beyond = masks == OUTSIDE
    targets = masks.long().masked_fill_(beyond, IGNORED)
    return preprocessing.normalise(images).masked_fill_(beyond[:, None], 0.0), targets
