"""Predictions to look at: masks as palette PNG, and over their images."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pdvit.tasks.windows import Network, SlidingWindowConfig, score_rows

Palette = Sequence[tuple[int, int, int]]
# Colour of pixels without a class, and how much of a class's colour lies over an image.
NONE, OVER = (255, 255, 255), 0.6
# Longest side of the pictures that a run keeps.
SHOWN = 512


@torch.no_grad()
def predicted_mask(
    network: Network, image: Tensor, size: tuple[int, int], classes: int, config: SlidingWindowConfig
) -> Tensor:
    """Return the class of every pixel, uint8 `size` on the CPU.

    Args:
        network: images to logits, in evaluation mode.
        image: `(1, 3, h, w)`, normalised.
        size: height and width of the mask.
        classes: number of classes, at most 255.
        config: windows, scales, flips.
    """
    mask = torch.empty(size, dtype=torch.uint8)
    for top, scores in score_rows(network, image, size, classes, config):
        mask[top : top + scores.shape[1]] = scores.argmax(0).byte().cpu()
    return mask


def as_palette(mask: Tensor, palette: Palette) -> Image.Image:
    """Return a mask, uint8 `(H, W)`, as an image of its values, each shown in its class's colour; 255 is white."""
    colours = [*palette, *[(0, 0, 0)] * (255 - len(palette)), NONE]
    image = Image.fromarray(mask.numpy())
    image.putpalette([level for colour in colours for level in colour])
    return image


def overlay(image: Image.Image, mask: Tensor, palette: Palette) -> Image.Image:
    """Lay the colours of a mask over its image, which has the same size; pixels without a class stay as they are."""
    colours = Image.blend(image, as_palette(mask, palette).convert("RGB"), OVER)
    colours.paste(image, mask=Image.fromarray(np.where(mask.numpy() == 255, 255, 0).astype(np.uint8)))
    return colours


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def shown(image: Image.Image) -> Image.Image:
    """Return an image, or a mask with its palette, no larger than is needed to look at it."""
    share = SHOWN / max(image.size)
    if share >= 1:
        return image
    size = tuple(max(1, round(side * share)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BOX)
