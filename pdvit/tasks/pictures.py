"""Predicted masks as pictures: palette PNGs, and overlays on their images."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import Config
from pdvit.data.images import BadImage, try_read
from pdvit.data.loader import LoaderConfig
from pdvit.data.masks.batches import evaluation_pixels
from pdvit.data.masks.split import MaskSplit
from pdvit.data.masks.table import default_palette
from pdvit.data.sources.split import Source, Split, subsample
from pdvit.engine.device import autocast
from pdvit.tasks.windows import Network, SlidingWindowConfig, score_rows

Palette = Sequence[tuple[int, int, int]]
# Colour of pixels without a class, and the opacity of a class's colour on an image.
UNLABELLED, OPACITY = (255, 255, 255), 0.6
# Number and longest side of the pictures that a run keeps.
PICTURES, LONGEST_SIDE = 8, 512


@torch.no_grad()
def predict_mask(
    network: Network, image: Tensor, size: tuple[int, int], classes: int, config: SlidingWindowConfig
) -> Tensor:
    """Return the class of every pixel, uint8 of this size, on the CPU; arguments as for `score_rows`."""
    mask = torch.empty(size, dtype=torch.uint8)
    for top, scores in score_rows(network, image, size, classes, config):
        mask[top : top + scores.shape[1]] = scores.argmax(0).byte().cpu()
    return mask


def predict_masks(
    network: Network, split: Split, classes: int, loader: LoaderConfig, config: Config, windows: SlidingWindowConfig
) -> Iterator[tuple[int, Image.Image, Tensor]]:
    """Yield index, image and mask, of the image's size, of every image that decodes; `loader.bad` gets the others."""
    side, interpolation = config.segment.short_side, loader.preprocessing.interpolation
    for index in range(len(split)):
        image = try_read(split, index)
        if isinstance(image, BadImage):
            loader.bad.add([image])
            continue
        pixels = evaluation_pixels(image, side, interpolation)[None].to(loader.device)
        with autocast(loader.device, config.run.precision):
            normalised, (width, height) = loader.preprocessing.normalise(pixels), image.size
            mask = predict_mask(network, normalised, (height, width), classes, windows)
        yield index, image, mask


def palette_image(mask: Tensor, palette: Palette) -> Image.Image:
    """Return a mask, uint8 `(H, W)`, as an image of its values with the colours of the classes; 255 is white."""
    colours = [*palette, *[(0, 0, 0)] * (255 - len(palette)), UNLABELLED]
    image = Image.fromarray(mask.numpy())
    image.putpalette([level for colour in colours for level in colour])
    return image


def overlay(image: Image.Image, mask: Tensor, palette: Palette) -> Image.Image:
    """Blend the colours of a mask into its image; pixels without a class stay as they are."""
    colours = Image.blend(image, palette_image(mask, palette).convert("RGB"), OPACITY)
    colours.paste(image, mask=Image.fromarray(np.where(mask.numpy() == 255, 255, 0).astype(np.uint8)))
    return colours


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def thumbnail(image: Image.Image) -> Image.Image:
    """Return an image, or a palette image, scaled down to 512 pixels on its longest side."""
    scale = LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BOX)


def prediction_pngs(
    network: Network,
    split: MaskSplit,
    source: Source,
    loader: LoaderConfig,
    config: Config,
    windows: SlidingWindowConfig,
) -> dict[str, bytes]:
    """Return small PNG files of image, truth and prediction, for 8 images spread evenly over a split."""
    chosen, classes = subsample(split, PICTURES), len(source.classes)
    assert isinstance(chosen, MaskSplit)
    files, palette = dict[str, bytes](), source.palette or default_palette(classes)
    predicted = predict_masks(network, chosen, classes, loader, config, windows)
    for number, (index, image, mask) in enumerate(predicted, 1):
        masks = {"truth": chosen.mask(index), "prediction": mask}
        pictures = {"image": image} | {name: palette_image(mask, palette) for name, mask in masks.items()}
        files |= {f"predictions/{number:02}-{name}.png": png(thumbnail(part)) for name, part in pictures.items()}
    return files
