"""Scores of every pixel of a mask: averaged over scales and mirror images, in parts that fit in memory."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.tasks.windows import Network, SlidingWindowConfig, pixel_logits, resize

# The factors of `--ms`, mmsegmentation's.
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# The most numbers in a map of scores: beyond, the image is divided into tiles.
MAP = 2**30
# The most numbers that are brought to the size of the mask, and compared, at once.
BLOCK = 2**26


class Part(NamedTuple):
    """Scores `(C, R, W)` of a rectangle of an image, whose first pixel is at `top` and `left`.

    The largest score is the pixel's class; `cross_entropy` takes them as logits.
    """

    top: int
    left: int
    scores: Tensor


class _Side(NamedTuple):
    """One side of a tile: pixels `begin` to `end` of the mask, and of the image `first` to `last`, which is more.

    `at` and `length` say where the pixels of the image lie in the mask.
    """

    begin: int
    end: int
    first: int
    last: int
    at: int
    length: int


def score_parts(
    network: Network, image: Tensor, size: tuple[int, int], classes: int, how: SlidingWindowConfig
) -> Iterator[Part]:
    """Yield the scores of all pixels of a mask, each in exactly one part.

    Of one view these are logits; of several the logarithm of the mean of their probabilities (softmax). Maps are
    resized bilinearly, masks never.

    Args:
        network: images to logits.
        image: `(1, 3, h, w)`, normalised.
        size: height and width of its mask.
        classes: how many there are.
        how: windows, scales, flips.
    """
    rows, columns = tiles(tuple(image.shape[-2:]), size, classes, how)
    for row in rows:
        for column in columns:
            seen = image[..., row.first : row.last, column.first : column.last]
            for start, scores in _scores(network, seen, (row.length, column.length), how):
                # of the tile and its surroundings, the tile
                begin, end = row.begin - row.at - start, row.end - row.at - start
                inside = scores[:, max(0, begin) : max(0, end), column.begin - column.at : column.end - column.at]
                if inside.shape[1]:
                    yield Part(row.at + start + max(0, begin), column.begin, inside)


def tiles(
    image: tuple[int, ...], mask: tuple[int, int], classes: int, how: SlidingWindowConfig
) -> tuple[list[_Side], list[_Side]]:
    """Divide a mask into rows and columns of tiles whose maps fit in memory: nearly always one of each.

    What surrounds a tile, up to a window, is looked at with it.
    """
    most = max(max(*how.scales, 1.0) ** 2 * image[0] * image[1], mask[0] * mask[1])  # the mask is never scaled
    cuts = math.ceil(math.sqrt(classes * most / MAP))
    rows, columns = (
        [_side(length * k // count, length * (k + 1) // count, image[axis], length, how.window) for k in range(count)]
        for axis, length in enumerate(mask)
        if (count := min(cuts, length))
    )
    return rows, columns


def _side(begin: int, end: int, image: int, mask: int, margin: int) -> _Side:
    first = max(0, begin * image // mask - margin)
    last = min(image, -(-end * image // mask) + margin)
    at, behind = (math.floor(place * mask / image + 0.5) for place in (first, last))
    return _Side(begin, end, first, last, at, behind - at)


def _scores(
    network: Network, image: Tensor, size: tuple[int, int], how: SlidingWindowConfig
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the scores `(C, R, W)` of each block of rows."""
    views = [(scale, mirrored) for scale in how.scales for mirrored in (False, True)[: 1 + how.flip]]
    total: Tensor | None = None
    for scale, mirrored in views:
        logits = _view(network, image, scale, mirrored, how)
        if len(views) == 1:
            yield from ((rows.start, resized_rows(logits, size, rows)[0]) for rows in _blocks(logits.shape[1], size))
            return
        if total is None:
            total = logits.new_zeros(logits.shape[1], *size)
        for rows in _blocks(logits.shape[1], size):
            total[:, rows.start : rows.stop] += resized_rows(logits, size, rows)[0].softmax(0)
        del logits
    assert total is not None
    total.div_(len(views)).clamp_(min=torch.finfo(total.dtype).tiny).log_()
    yield from ((rows.start, total[:, rows.start : rows.stop]) for rows in _blocks(len(total), size))


def _view(network: Network, image: Tensor, scale: float, mirrored: bool, how: SlidingWindowConfig) -> Tensor:
    """Return the logits `(1, C, h, w)` of an image that was resized and perhaps mirrored, mirrored back."""
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in image.shape[-2:])
    seen = resize(image, (height, width))
    logits = pixel_logits(network, seen.flip(-1) if mirrored else seen, how)
    return logits.flip(-1) if mirrored else logits


def _blocks(classes: int, size: tuple[int, int]) -> list[range]:
    """Divide the rows of a map."""
    height, width = size
    rows = max(1, BLOCK // (classes * width))
    return [range(start, min(start + rows, height)) for start in range(0, height, rows)]


def resized_rows(maps: Tensor, size: tuple[int, int], rows: range) -> Tensor:
    """Return some rows of `resize(maps, size)`: maps `(1, C, h, w)` to `(1, C, R, W)`."""
    if len(rows) == size[0]:
        return resize(maps, size)
    height = maps.shape[-2]
    at = ((torch.arange(rows.start, rows.stop, device=maps.device) + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = at.long().clamp(max=height - 1)
    below = (above + 1).clamp(max=height - 1)
    share = (at - above).to(maps.dtype)[:, None]
    mixed = torch.lerp(maps[:, :, above], maps[:, :, below], share)
    return F.interpolate(mixed, size=(len(rows), size[1]), mode="bilinear", align_corners=False)
