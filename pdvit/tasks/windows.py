"""Logits of every pixel of an image of any size, in bounded memory: the image at once, or window by window."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.engine.device import is_out_of_memory

Network = Callable[[Tensor], Tensor]
"""Images `(B, 3, H, W)` to logits `(B, C, h, w)` of any size."""

# The most pixels that one forward pass takes when images are evaluated whole: Cityscapes at a scale of 1.75 fits.
WHOLE = 2**23


@dataclass(frozen=True)
class SlidingWindowConfig:
    """How an image is looked at.

    Attributes:
        mode: `whole` or `slide`.
        window: side of a window in pixels.
        stride: pixels from window to window, at most `window`.
        batch: windows of one forward pass.
        scales: factors of the image's size; scores are averaged over them.
        flip: mirror each of them too.
    """

    mode: str
    window: int
    stride: int
    batch: int = 1
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def too_large(self, height: int, width: int) -> bool:
        """Tell whether an image of this size is evaluated in windows, although whole was asked for."""
        most = max(self.scales) ** 2
        return self.mode == "whole" and height * width * most > WHOLE


def pixel_logits(network: Network, image: Tensor, how: SlidingWindowConfig) -> Tensor:
    """Return float32 logits `(1, C, H, W)` of an image `(1, 3, H, W)`: one for each of its own pixels."""
    height, width = image.shape[-2:]
    if how.mode == "slide" or height * width > WHOLE:
        return slide(network, image, how.window, how.stride, how.batch)
    try:
        return resize(network(image).float(), (height, width))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # behind the handler: the error holds what the pass has computed
    torch.cuda.empty_cache()
    return slide(network, image, how.window, how.stride, 1)


def slide(network: Network, image: Tensor, window: int, stride: int, batch: int) -> Tensor:
    """Return logits `(1, C, H, W)` of an image `(1, 3, H, W)`, averaged over windows `stride` pixels apart.

    The last window of a row or column ends where the image does, as in mmsegmentation. An image that is smaller than a
    window is filled up with zeros, right and bottom.
    """
    from monai.inferers.utils import sliding_window_inference

    def logits_of(windows: Tensor) -> Tensor:
        # monai adds up in what comes back, and in the type of what goes in
        logits = network(windows).float()
        return logits.clone() if logits.shape[-2:] == windows.shape[-2:] else resize(logits, windows.shape[-2:])

    height, width = image.shape[-2:]
    filled = F.pad(image.float(), (0, max(0, window - width), 0, max(0, window - height)))
    # monai takes the stride as a share that overlaps, and rounds down: half a pixel more, and it finds the stride again
    overlap = max(0.0, 1 - (stride + 0.5) / window)
    logits = sliding_window_inference(filled, (window, window), batch, logits_of, overlap)
    assert isinstance(logits, Tensor)
    return logits[..., :height, :width]


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return maps `(B, C, h, w)` in another size, bilinear with `align_corners=False`."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
