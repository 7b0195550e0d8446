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
from pdvit.data.masks.table import default_palette
from pdvit.data.sources.split import MaskSplit, Source, Split, subsample
from pdvit.engine.device import autocast
from pdvit.tasks.windows import Network, SlidingWindowConfig, score_rows

Palette = Sequence[tuple[int, int, int]]
# Colour of pixels without a class, and the opacity of a class's colour on an image.
UNLABELLED, OPACITY = (255, 255, 255), 0.6
# Number and longest side of the pictures that a run keeps.
PICTURES, LONGEST_SIDE = 8, 512


@torch.no_grad()
def predict_masks(
    network: Network, split: Split, classes: int, loader: LoaderConfig, config: Config, windows: SlidingWindowConfig
) -> Iterator[tuple[int, Image.Image, Tensor]]:
    """Yield index, image and mask (uint8, of its size) of every image that decodes; `loader.bad` gets the others."""
    for index in range(len(split)):
        image = try_read(split, index)
        if isinstance(image, BadImage):
            loader.bad.add([image])
            continue
        pixels = evaluation_pixels(image, config.segment.short_side, loader.preprocessing.interpolation)
        normalised, size = loader.preprocessing.normalise(pixels[None].to(loader.device)), (image.height, image.width)
        with autocast(loader.device, config.run.precision):
            blocks = score_rows(network, normalised, size, classes, windows)
            mask = torch.cat([scores.argmax(0).byte().cpu() for _, scores, _ in blocks])
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


def prediction_pngs(
    network: Network, split: Split, source: Source, loader: LoaderConfig, config: Config, windows: SlidingWindowConfig
) -> dict[str, bytes]:
    """Return small PNG files of image, truth and prediction, for images spread evenly over a split."""
    chosen, classes = subsample(split, PICTURES), len(source.classes)
    assert isinstance(chosen, MaskSplit)
    files, palette = dict[str, bytes](), source.palette or default_palette(classes)
    predicted = predict_masks(network, chosen, classes, loader, config, windows)
    for number, (index, image, mask) in enumerate(predicted, 1):
        masks = {"truth": chosen.mask(index), "prediction": mask}
        pictures = {"image": image} | {name: palette_image(mask, palette) for name, mask in masks.items()}
        for name, picture in pictures.items():
            box = Image.Resampling.NEAREST if picture.mode == "P" else Image.Resampling.BOX
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), box)
            files[f"predictions/{number:02}-{name}.png"] = png(picture)
    return files
