"""The random resized crop, for a worker's single images and for a batch that lies on the device; and the shift.

Both cut the same box for the same draws, and both resample as Pillow does: along the rows first, rounded to whole
levels, then along the columns.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TRIES = 10
DRAWS = 2 * TRIES + 2


def crop_boxes(
    draws: Tensor, heights: Tensor, widths: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Return the box of a random resized crop for each image, `(B, 4)`: top, left, height, width.

    The share of the area is drawn from `scale`, the ratio of width to height from `ratio` on a log scale; the first of
    ten tries that fits counts, else the largest central box of an allowed ratio (as torchvision and timm do).

    Args:
        draws: `(B, 22)`, numbers in [0, 1), on the host.
        heights, widths: of the images, `(B,)`.
        scale, ratio: least and most.
    """
    draws, heights, widths = draws.double(), heights.double()[:, None], widths.double()[:, None]
    tries = draws[:, : 2 * TRIES].view(-1, TRIES, 2)
    area = heights * widths * between(tries[..., 0], *scale)
    shape = between(tries[..., 1], math.log(ratio[0]), math.log(ratio[1])).exp()
    wide, tall = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (wide >= 1) & (wide <= widths) & (tall >= 1) & (tall <= heights)
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1, keepdim=True)
    wide = torch.where(found, wide.gather(1, first), (heights * ratio[1]).round().clamp(min=1).minimum(widths))
    tall = torch.where(found, tall.gather(1, first), (widths / ratio[0]).round().clamp(min=1).minimum(heights))
    free = torch.cat([heights - tall, widths - wide], 1)
    corner = torch.where(found, (draws[:, -2:] * (free + 1)).floor(), (free / 2).floor())
    return torch.cat([corner, tall, wide], 1).long()


def between(draws: Tensor, low: float, high: float) -> Tensor:
    """Stretch numbers in [0, 1) to [low, high)."""
    return low + (high - low) * draws


def crop_pixels(pixels: Any, box: tuple[float, float, float, float], size: int, mode: str) -> Tensor:
    """Cut a box out of an image and resample it to `(3, size, size)`, uint8.

    Args:
        pixels: `(H, W, 3)`, a uint8 array.
        box: top, left, height and width in its pixels; the edges are rounded to whole ones.
        size, mode: side of the result, `bilinear` or `bicubic`.
    """
    top, left = round(box[0]), round(box[1])
    bottom, right = max(top + 1, round(box[0] + box[2])), max(left + 1, round(box[1] + box[3]))
    cut = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    return F.interpolate(cut, (size, size), mode=mode, antialias=True)[0]


def crop_batch(images: Tensor, boxes: Tensor, size: int, mode: str) -> Tensor:
    """Cut a box out of each image of a batch and resample it to `(B, C, size, size)`, uint8.

    Args:
        images: uint8 `(B, C, H, W)`, neither side larger than `size`: nothing is ever scaled down.
        boxes: `(B, 4)` on the same device: top, left, height, width.
        size, mode: side of the result, `bilinear` or `bicubic`.
    """
    count, channels, height, width = images.shape
    top, left, tall, wide = boxes.unbind(1)
    across = _weights(left, wide, width, size, mode)
    rows = _levels(images.float().view(count, channels * height, width) @ across.mT)
    down = _weights(top, tall, height, size, mode)
    return _levels(down[:, None] @ rows.view(count, channels, height, size)).to(torch.uint8)


def _levels(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255)


def _weights(start: Tensor, length: Tensor, side: int, size: int, mode: str) -> Tensor:
    """Return what each of `side` pixels gives to `size` ones that show [start, start + length): `(B, size, side)`.

    In parts of 1024, so that a product with a level, and their sum, is exact in float32 and TF32 alike: then neither
    the batch, nor the device, nor the order of adding up can make a difference.
    """
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(side, device=start.device)
    middle = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * (length / size)
    weights = _kernel(pixel + 0.5 - middle, mode) * ((pixel >= start) & (pixel < start + length))
    weights = (weights * (1024 / weights.sum(2, keepdim=True))).round_()
    largest = weights.argmax(2, keepdim=True)
    return weights.scatter_add_(2, largest, 1024 - weights.sum(2, keepdim=True)) / 1024


def _kernel(distance: Tensor, mode: str) -> Tensor:
    """Return Pillow's weight of a pixel at a distance: a triangle, or Keys' cubic with a = -0.5."""
    distance = distance.abs()
    if mode == "bilinear":
        return (1 - distance).clamp(min=0)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def shift_images(images: Tensor, most: int, draws: Tensor) -> Tensor:
    """Move each image by -most ... most pixels down and right, repeating the border.

    Args:
        images: `(B, C, H, W)`, any dtype.
        most: the largest shift in pixels.
        draws: `(B, 2)`, numbers in [0, 1) that decide the shift of each image.
    """
    height, width = images.shape[-2:]
    offset = (draws * (2 * most + 1)).long() - most
    rows = (torch.arange(height, device=images.device) - offset[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offset[:, 1:]).clamp(0, width - 1)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
