"""Training and evaluation batches of images with masks, with MMSegmentation's chain made of torchvision's transforms.

Scale, crop, flip, colours, in this order. Images smaller than the crop are padded right and bottom: 0, if normalized.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pdvit.config.schema import SegmentConfig
from pdvit.data.images import BadImage, BadMask, Pair, Sample, Samples, attempt, pixels_of, try_mask, try_read
from pdvit.data.loader import Batch, LoaderConfig, decode, from_workers, step_indices
from pdvit.data.masks.table import IGNORED, OUTSIDE
from pdvit.data.randomness import fold, seeded
from pdvit.data.sources.split import MaskSplit

LONGEST = 4  # longest side as a multiple of the short side; MMSegmentation: 2048 to 512
RETRIES = 10
HUE = (-0.1, 0.1)  # as in MMSegmentation


def train_batches(
    split: MaskSplit, loader: LoaderConfig, segment: SegmentConfig, crop: int, start: int, hflip: float | None = None
) -> Generator[Batch]:
    """Yield this rank's part of steps start, start + 1, ...: crops `(B, 3, crop, crop)` and targets `(B, crop, crop)`.

    Targets are training ids, int64, 255 for pixels without a class. `hflip` None is the split's default.
    """
    flip = split.flip if hflip is None else hflip
    transform = partial(training_pair, segment, loader, crop, flip)
    steps = step_indices(len(split), loader, start)
    for batch in from_workers(Samples(split, partial(read_pairs, transform)), loader, steps):
        outside = batch.targets == OUTSIDE
        images = loader.preprocessing.normalise(batch.images, training=True).masked_fill_(outside[:, None], 0.0)
        yield replace(batch, images=images, targets=batch.targets.long().masked_fill_(outside, IGNORED))


def eval_batches(split: MaskSplit, loader: LoaderConfig, segment: SegmentConfig) -> Iterator[Batch]:
    """Yield each image of this rank's part of a split once, by itself: `(1, 3, h, w)` at the evaluation size.

    Targets `(1, H, W)` have the mask's own size. Ranks may have different numbers of images, or none.
    """
    keys = [(-1, [index]) for index in range(*loader.share(len(split)))]
    transform = partial(_evaluation_pair, segment.short_side, loader.preprocessing.interpolation)
    pairs = Samples(split, partial(read_pairs, transform))
    for images, masks, index in decode(pairs, replace(loader, processes=1), keys):
        yield Batch(loader.preprocessing.normalise(images), masks.long(), index)


def _evaluation_pair(side: int | None, interpolation: str, pair: Pair, epoch: int, index: int) -> tuple[Tensor, Tensor]:
    return evaluation_pixels(pair[0], side, interpolation), pair[1]


def read_pairs(
    transform: Callable[[Pair, int, int], tuple[Tensor, Tensor]], split: MaskSplit, epoch: int, indices: list[int]
) -> list[Sample]:
    """Return transformed images, uint8 (or their faults, or those of masks), with mask and index."""
    samples: list[Sample] = []
    for index in indices:
        image = try_read(split, index)
        mask = try_mask(split, index, None if isinstance(image, BadImage) else image.size)
        found: Any = mask if isinstance(mask, BadMask) else image
        if isinstance(image, Image.Image) and isinstance(mask, Tensor):
            found = attempt(split, index, partial(transform, (image, mask), epoch))
        samples.append((found, 0, index) if isinstance(found, BadImage) else (*found, index))
    return samples


def evaluation_pixels(image: Image.Image, side: int | None, interpolation: str) -> Tensor:
    """Return an image, uint8 `(3, h, w)`, scaled to a short side if there is one; the long side is limited."""
    pixels = pixels_of(image)
    if side is None:
        return pixels
    height, width = pixels.shape[-2:]
    long, limit = side * max(height, width) // min(height, width), LONGEST * side
    short, long = (side, long) if long <= limit else (max(1, limit * side // long), limit)
    size = [short, long] if height < width else [long, short]
    resized: Tensor = functional.resize(pixels, size, v2.InterpolationMode(interpolation), antialias=True)
    return resized


def training_pair(
    segment: SegmentConfig, loader: LoaderConfig, side: int, flip: float, pair: Pair, epoch: int, index: int
) -> tuple[Tensor, Tensor]:
    """Return a crop of an image, uint8 `(3, side, side)`, and of its mask, with 254 outside of the image.

    It is a function of (seed, epoch, index). The short side is drawn, and the long one limited.
    """
    target, mode = segment.short_side or min(pair[1].shape), v2.InterpolationMode(loader.preprocessing.interpolation)
    least, most = (max(1, round(factor * target)) for factor in segment.jitter)
    resize = ShortestSize(list(range(least, most + 1)), LONGEST * most, mode)
    with seeded(fold(loader.seed, epoch, index)):
        parts = resize(tv_tensors.Image(pixels_of(pair[0])), tv_tensors.Mask(pair[1]))
        box = draw_crop(parts[1].as_subclass(Tensor), side, segment.max_share)
        parts = v2.RandomHorizontalFlip(flip)(*(functional.crop(part, *box) for part in parts))
        image, mask = PhotometricDistort(hue=HUE)(*parts) if segment.photometric else parts
    padding = [0, 0, side - mask.shape[-1], side - mask.shape[-2]]
    image, mask = functional.pad(image, padding), functional.pad(mask, padding, fill=OUTSIDE)
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def draw_crop(mask: Tensor, side: int, max_fraction: float) -> tuple[int, int, int, int]:
    """Draw a crop of a mask `(H, W)`: top, left, height, width.

    It is drawn up to 11 times, until it has two classes or more, none with this fraction of the labelled pixels.
    """
    rows, columns = mask.shape
    height, width = min(side, rows), min(side, columns)
    for _ in range(RETRIES + 1):
        top, left = (int(torch.randint(room + 1, ())) for room in (rows - height, columns - width))
        if max_fraction == 1 or (height, width) == (rows, columns):
            break
        counts = mask[top : top + height, left : left + width].flatten().bincount()[:OUTSIDE]
        if (counts > 0).sum() > 1 and counts.max() < max_fraction * counts.sum():
            break
    return top, left, height, width


class ShortestSize(v2.RandomShortestSize):  # type: ignore[misc]
    """A random short side and a limited long one; thin strips keep a pixel."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        return {"size": tuple(max(1, side) for side in super().make_params(flat_inputs)["size"])}


class PhotometricDistort(v2.RandomPhotometricDistort):  # type: ignore[misc]
    """Random brightness, contrast, saturation and hue; channels stay in order, as in MMSegmentation."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factors."""
        params: dict[str, Any] = super().make_params(flat_inputs)
        return params | {"channel_permutation": None}
