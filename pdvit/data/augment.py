"""Augmentation of training images.

In the workers, image by image: the random crop, which needs the original pixels, and timm's RandAugment or colour
jitter. On the device, in batch: shift, flip and erasing; of a resident set also the crop. All draws are functions of
(seed, epoch, sample index). They are made on the host, where the indices are, and the host never waits for the device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from pdvit.config.schema import AugmentConfig
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.randomness import fold, normal, seeded, uniform
from pdvit.data.sources.split import ArraySplit, Split

DEFAULT_SCALE, DEFAULT_HFLIP = (0.35, 1.0), 0.5  # defaults for image files
TRIES = 10  # attempts to draw a box that fits
CROP_DRAWS, ERASE_DRAWS = 2 * TRIES + 2, 2 * TRIES + 3
# Of erased boxes: fraction of the area, and ratio of height to width, (min, max) as in timm.
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
# The independent draws of a sample; part of their seeds, so these numbers must not change.
CROP, FLIP, POLICY, ERASE, NOISE = 1, 2, 3, 5, 6
Range = tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a run; without `scale` in the configuration images are not cropped."""

    config: AugmentConfig
    preprocessing: Preprocessing
    seed: int

    @classmethod
    def for_split(cls, split: Split, config: AugmentConfig, preprocessing: Preprocessing, seed: int) -> "Augmentation":
        """Fill in unset values: crop and flip for image files, neither for sets held in memory."""
        default_scale, default_hflip = (None, 0.0) if isinstance(split, ArraySplit) else (DEFAULT_SCALE, DEFAULT_HFLIP)
        scale, hflip = config.scale or default_scale, default_hflip if config.hflip is None else config.hflip
        jitter = 0.0 if config.auto_augment else config.color_jitter  # as in timm
        return cls(replace(config, scale=scale, hflip=hflip, color_jitter=jitter), preprocessing, seed)

    def describe(self) -> str:
        """Return a short description."""
        config = self.config
        parts = [f"crop of {config.scale[0]:.0%} to {config.scale[1]:.0%}"] if config.scale else []
        parts += [f"RandAugment {config.auto_augment}"] if config.auto_augment else []
        parts += [f"colour jitter {config.color_jitter:g}"] if config.color_jitter else []
        parts += [f"shift by up to {config.shift}"] if config.shift else []
        parts += [f"flip {config.hflip:.0%}"] if config.hflip else []
        parts += [f"erase {config.reprob:.0%}"] if config.reprob else []
        return ", ".join(parts) or "none"

    @property
    def per_image(self) -> bool:
        """Whether timm transforms each image by itself, in the workers."""
        return bool(self.config.auto_augment or self.config.color_jitter)

    @cached_property
    def _policy(self) -> Any:
        """The transform of PIL images: timm's RandAugment, or else its colour jitter."""
        config, own = self.config, self.preprocessing
        settings: dict[str, Any] = {"auto_augment": config.auto_augment, "color_jitter": config.color_jitter}
        settings |= {"interpolation": own.interpolation, "mean": own.mean}
        _, transform, _ = transforms_imagenet_train(own.size, separate=True, **settings)
        for operation in getattr(transform.transforms[0], "ops", ()):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
        return transform

    def transform(self, image: Tensor, epoch: int, index: int) -> Tensor:
        """Apply timm's transform to a cropped image, uint8 `(3, size, size)`, seeded by (seed, epoch, index)."""
        if not self.per_image:
            return image
        with seeded(fold(self.seed, epoch, POLICY, index)):
            changed: Tensor = v2.functional.pil_to_tensor(self._policy(v2.functional.to_pil_image(image)))
            return changed

    def crop_boxes(self, epoch: int, index: Tensor) -> list[Callable[[int, int], list[int]]]:
        """Return for each image the function from its height and width to its crop: top, left, height, width."""
        scale, ratio = self.config.scale, self.config.ratio
        if scale is None:
            return [lambda height, width: [0, 0, height, width]] * len(index)
        draws = uniform(fold(self.seed, epoch, CROP), index, CROP_DRAWS).tolist()
        return [partial(crop_box, row, scale, ratio) for row in draws]

    def crop(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Crop a batch on the device, uint8 `(B, 3, h, w)`, to the input size."""
        if not self.config.scale:
            return images
        boxes = torch.tensor([box(*images.shape[2:]) for box in self.crop_boxes(epoch, index)])
        boxes = boxes.to(images.device, non_blocking=True)
        return crop_batch(images, boxes, self.preprocessing.size, self.preprocessing.interpolation)

    def __call__(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Return the input of the model, float32, of uint8 images `(B, 3, size, size)`; `index` is on the host."""
        config, device = self.config, images.device
        if config.shift:
            draws = uniform(fold(self.seed, epoch), index, 2).to(device, non_blocking=True)
            images = shift_images(images, config.shift, draws)
        if config.hflip:
            flip = uniform(fold(self.seed, epoch, FLIP), index, 1)[:, :, None, None] < config.hflip
            images = torch.where(flip.to(device, non_blocking=True), images.flip(3), images)
        images = self.preprocessing.normalise(images, training=True)
        if config.reprob:
            rows = uniform(fold(self.seed, epoch, ERASE), index, ERASE_DRAWS).tolist()
            boxes = [erase_box(row, config.reprob, *images.shape[2:]) for row in rows]
            erase(images, boxes, fold(self.seed, epoch, NOISE), index)
        return images


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize as timm does, also to 0 bits (black), which newer versions of Pillow refuse."""
    return auto_augment.posterize(image, bits) if bits else image.point(lambda _: 0)


def crop_box(draws: Sequence[float], scale: Range, ratio: Range, height: int, width: int) -> list[int]:
    """Return the box of a random resized crop: top, left, height, width.

    The first of ten tries that fits counts, else the largest central box of an allowed ratio, as in torchvision.
    `draws` are 22 numbers in [0, 1), `scale` and `ratio` the ranges of the area fraction and of width:height.
    """
    for wide, tall in _tries(draws[:-2], height * width, scale, ratio):
        if 1 <= wide <= width and 1 <= tall <= height:
            return [int(draws[-2] * (height - tall + 1)), int(draws[-1] * (width - wide + 1)), tall, wide]
    wide, tall = min(max(1, round(height * ratio[1])), width), min(max(1, round(width / ratio[0])), height)
    return [(height - tall) // 2, (width - wide) // 2, tall, wide]


def erase_box(draws: Sequence[float], probability: float, height: int, width: int) -> list[int] | None:
    """Return the rectangle to erase (arXiv 1708.04896), if any: top, left, height, width; by 23 draws in [0, 1)."""
    for tall, wide in _tries(draws[3:], height * width, ERASED_AREA, ERASED_RATIO):
        if tall < height and wide < width and draws[0] < probability:
            return [int(draws[1] * (height - tall + 1)), int(draws[2] * (width - wide + 1)), tall, wide]
    return None


def _tries(draws: Sequence[float], area: int, scale: Range, ratio: Range) -> Iterator[tuple[int, int]]:
    """Yield the sides sqrt(area * ratio) and sqrt(area / ratio) of every try, in whole pixels."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for size, shape in zip(draws[::2], draws[1::2], strict=True):
        part, drawn = area * (scale[0] + (scale[1] - scale[0]) * size), math.exp(low + (high - low) * shape)
        yield round(math.sqrt(part * drawn)), round(math.sqrt(part / drawn))


def crop_pixels(pixels: Any, box: Sequence[float], size: int, mode: str) -> Tensor:
    """Resample a box (top, left, height, width; rounded) of a uint8 array `(H, W, 3)` to `(3, size, size)`, uint8."""
    top, left = round(box[0]), round(box[1])
    bottom, right = max(top + 1, round(box[0] + box[2])), max(left + 1, round(box[1] + box[3]))
    cut = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    return F.interpolate(cut, (size, size), mode=mode, antialias=True)[0]


def crop_batch(images: Tensor, boxes: Tensor, size: int, mode: str) -> Tensor:
    """Crop each image of a batch, uint8 `(B, C, H, W)`, and resample it to `(B, C, size, size)`, as Pillow does.

    Rows are resampled first and rounded to whole levels, then columns. No side is larger than `size`: images are never
    scaled down. `boxes` `(B, 4)` are top, left, height and width, on the same device.
    """
    count, channels, height, width = images.shape
    top, left, tall, wide = boxes.unbind(1)
    across = _resampling_weights(left, wide, width, size, mode)
    rows = (images.float().view(count, channels * height, width) @ across.mT).round_().clamp_(0, 255)
    down = _resampling_weights(top, tall, height, size, mode)
    columns = down[:, None] @ rows.view(count, channels, height, size)
    return columns.round_().clamp_(0, 255).to(torch.uint8)


def _resampling_weights(start: Tensor, length: Tensor, side: int, size: int, mode: str) -> Tensor:
    """Return the weights `(B, size, side)` of `side` pixels for `size` output pixels that show [start, start + length).

    They are multiples of 1/1024, so that sums of products with levels are exact in float32 and in TF32: neither the
    batch, nor the device, nor the order of summation makes a difference.
    """
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(side, device=start.device)
    middle = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * (length / size)
    distance = (pixel + 0.5 - middle).abs()
    if mode == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:  # Keys' cubic with a = -0.5
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights * ((pixel >= start) & (pixel < start + length))
    weights = (weights * (1024 / weights.sum(2, keepdim=True))).round_()
    largest = weights.argmax(2, keepdim=True)
    return weights.scatter_add_(2, largest, 1024 - weights.sum(2, keepdim=True)) / 1024


def shift_images(images: Tensor, max_shift: int, draws: Tensor) -> Tensor:
    """Move images `(B, C, H, W)` by up to max_shift pixels, as `draws` `(B, 2)` in [0, 1) decide; borders repeat."""
    height, width = images.shape[-2:]
    offset = (draws * (2 * max_shift + 1)).long() - max_shift
    rows = (torch.arange(height, device=images.device) - offset[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offset[:, 1:]).clamp(0, width - 1)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def erase(images: Tensor, boxes: Sequence[Sequence[int] | None], seed: int, index: Tensor) -> None:
    """Fill rectangles of normalised images `(B, C, H, W)` in place, with noise of the seed and the host's `index`."""
    erased = {row: box for row, box in enumerate(boxes) if box}
    index = index[list(erased)].to(images.device, non_blocking=True)
    noise = normal(seed, index, images[0].numel()).view(len(index), *images.shape[1:])
    for (row, (top, left, tall, wide)), pixels in zip(erased.items(), noise, strict=True):
        rows, columns = slice(top, top + tall), slice(left, left + wide)
        images[row, :, rows, columns] = pixels[:, rows, columns]
