"""Scores of every pixel: of whole images or sliding windows, averaged over scales and mirror images."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.engine.device import is_out_of_memory
from pdvit.errors import UserError

Network = Callable[[Tensor], Tensor]
"""Images `(B, 3, H, W)` to logits `(B, C, h, w)` of any size."""

# MMSegmentation's scales of multi-scale evaluation (`--ms`).
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# Most pixels of one forward pass over a whole image: Cityscapes at a scale of 1.75 fits.
MAX_WHOLE = 2**23
# Most scores of one map (4 GiB in float32), and of a block of rows that is resized and compared at once.
MAX_SCORES, MAX_BLOCK = 2**30, 2**26


@dataclass(frozen=True)
class SlidingWindowConfig:
    """The windows and views of an image, over which scores are averaged."""

    mode: str  # whole or slide
    window: int  # side in pixels
    stride: int  # pixels from window to window, at most `window`
    batch: int = 1  # windows per forward pass
    scales: tuple[float, ...] = (1.0,)  # factors of the image's size
    flip: bool = False


def score_rows(
    network: Network, image: Tensor, size: tuple[int, int], classes: int, config: SlidingWindowConfig
) -> Iterator[tuple[int, Tensor, bool]]:
    """Yield the first row and the scores `(C, R, W)` of each block of rows of a mask, from top to bottom.

    The third value is whether the image was too large for mode `whole`, and was evaluated in windows. Scores of one
    view are logits; of several views, the logarithm of the mean probability (softmax). Maps are resized bilinearly.
    `image` `(1, 3, h, w)` is normalised, `size` is that of the mask. UserError for more than `MAX_SCORES` in a map.
    """
    views = [(scale, mirrored) for scale in config.scales for mirrored in (False, True)[: 1 + config.flip]]
    height, width = image.shape[-2:]
    pixels = math.ceil(max(config.scales) ** 2 * height * width)
    if len(views) > 1:  # their mean is a map of the mask's size; a single view is resized block by block
        pixels = max(pixels, math.prod(size))
    if classes * pixels > MAX_SCORES:
        raise UserError(
            f"{classes} classes of {pixels:,} pixels are more than {MAX_SCORES:,} scores",
            f"an image of {height}x{width} with a mask of {size[0]}x{size[1]}",
            "evaluate without --ms and --flip, set segment.short_side, or cut the image into smaller ones",
        )
    block = max(1, MAX_BLOCK // (classes * size[1]))
    blocks = [range(start, min(start + block, size[0])) for start in range(0, size[0], block)]
    total: Tensor | None = None
    large = False
    for scale, mirrored in views:
        view = resize(image, (max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))))
        logits, in_windows = pixel_logits(network, view.flip(-1) if mirrored else view, config)
        logits, large = logits.flip(-1) if mirrored else logits, large or in_windows
        # A large mask is resized in two steps, so that only a block of rows has its full width at once.
        tall = (logits,) if len(blocks) == 1 else resize(logits, (size[0], logits.shape[-1])).split(block, 2)
        parts = ((rows, resize(part, (len(rows), size[1]))[0]) for rows, part in zip(blocks, tall, strict=True))
        if len(views) == 1:
            yield from ((rows.start, part, large) for rows, part in parts)
            return
        total = logits.new_zeros(logits.shape[1], *size) if total is None else total
        for rows, part in parts:
            total[:, rows.start : rows.stop] += part.softmax(0)
        del logits, tall, parts, part
    assert total is not None
    total.div_(len(views)).clamp_(min=torch.finfo(total.dtype).tiny).log_()
    yield from ((rows.start, total[:, rows.start : rows.stop], large) for rows in blocks)


def pixel_logits(network: Network, image: Tensor, config: SlidingWindowConfig) -> tuple[Tensor, bool]:
    """Return float32 logits `(1, C, H, W)` of an image `(1, 3, H, W)`, and whether it was too large for `whole`."""
    (height, width), batch = image.shape[-2:], config.batch
    if config.mode == "whole" and height * width <= MAX_WHOLE:
        try:
            return resize(network(image).float(), (height, width)), False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # after the handler, because the error holds the tensors of the pass
        torch.cuda.empty_cache()
        batch = 1
    return slide(network, image, config.window, config.stride, batch), config.mode == "whole"


def slide(network: Network, image: Tensor, window: int, stride: int, batch: int) -> Tensor:
    """Return logits `(1, C, H, W)` of an image `(1, 3, H, W)`, averaged over windows `stride` pixels apart.

    The last window of a row or column ends at the border, as in MMSegmentation. An image smaller than a window is
    padded with zeros, right and bottom.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image.float(), (0, max(0, window - width), 0, max(0, window - height)))
    tops, lefts = (
        [min(start, side - window) for start in range(0, side - window + stride, stride)] for side in padded.shape[-2:]
    )
    corners = [(slice(top, top + window), slice(left, left + window)) for top in tops for left in lefts]
    total: Tensor | None = None
    counts = padded.new_zeros(padded.shape[-2:])
    for start in range(0, len(corners), batch):
        group = corners[start : start + batch]
        windows = torch.cat([padded[..., rows, columns] for rows, columns in group])
        logits = resize(network(windows).float(), (window, window))
        total = logits.new_zeros(1, logits.shape[1], *padded.shape[-2:]) if total is None else total
        for (rows, columns), part in zip(group, logits, strict=True):
            total[0, :, rows, columns] += part
            counts[rows, columns] += 1
    assert total is not None
    return total.div_(counts)[..., :height, :width]


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return maps `(B, C, h, w)` in another size, bilinear with `align_corners=False`."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
