"""Random erasing (arXiv 1708.04896): a rectangle of each chosen image becomes noise."""

import math

import torch
from torch import Tensor

from pdvit.data.augment.crop import TRIES, between
from pdvit.data.randomness import uniform

DRAWS = 3 + 2 * TRIES
# Share of the area, and ratio of height to width: least and most, as in timm.
AREA = (0.02, 1 / 3)
SHAPE = (0.3, 1 / 0.3)


def erase_boxes(draws: Tensor, probability: float, height: int, width: int) -> Tensor:
    """Return the rectangle to erase in each image, `(B, 4)`: top, left, height, width; height 0 erases nothing.

    Args:
        draws: `(B, 23)`, numbers in [0, 1), on the host.
        probability: share of images.
        height, width: of the images.
    """
    draws = draws.double()
    tries = draws[:, 3:].view(-1, TRIES, 2)
    area = height * width * between(tries[..., 0], *AREA)
    shape = between(tries[..., 1], math.log(SHAPE[0]), math.log(SHAPE[1])).exp()
    tall, wide = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(1, keepdim=True)
    done = fits.any(1, keepdim=True) & (draws[:, :1] < probability)
    tall, wide = tall.gather(1, first) * done, wide.gather(1, first)
    corner = draws[:, 1:3] * (torch.cat([height - tall, width - wide], 1) + 1)
    return torch.cat([corner.floor(), tall, wide], 1).long()


def erase(images: Tensor, boxes: Tensor, seed: int, index: Tensor) -> Tensor:
    """Fill rectangles of normalised images `(B, C, H, W)` with normal noise, each pixel its own, in place.

    Args:
        images: float32.
        boxes: `(B, 4)` on the host, of `erase_boxes`.
        seed, index: decide the noise, with one sample index for each image, `(B,)`, on the host.
    """
    rows = boxes[:, 2].nonzero()[:, 0]
    if not len(rows):
        return images
    device = images.device
    top, left, tall, wide = boxes[rows].to(device, non_blocking=True)[:, :, None].unbind(1)
    down = torch.arange(images.shape[2], device=device)
    right = torch.arange(images.shape[3], device=device)
    inside = ((down >= top) & (down < top + tall))[:, :, None] & ((right >= left) & (right < left + wide))[:, None]
    index, rows = index[rows].to(device, non_blocking=True), rows.to(device, non_blocking=True)
    noise = normal(seed, index, images[0].numel()).view(-1, *images.shape[1:])
    images[rows] = torch.where(inside[:, None], noise, images[rows])
    return images


def normal(seed: int, index: Tensor, draws: int) -> Tensor:
    """Return `draws` normal numbers for each sample, `(len(index), draws)`, float32: pairs by Box and Muller."""
    first, second = uniform(seed, index, draws + draws % 2).chunk(2, dim=1)
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :draws]
