"""Image files as torch data sets of uint8 tensors."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pdvit.data.augment import Augmentation, crop_pixels
from pdvit.data.bad_images import BadImage, Sample, attempt
from pdvit.data.sources import LazySplit, Split

# Files open at once: their crops are drawn together.
OPEN_FILES = 32
Keys = list[tuple[int, int]]


@contextmanager
def strict_decoders() -> Iterator[None]:
    """Turn Pillow's warning of a decompression bomb into an error, before the pixels are decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        yield


def read_image(image: Image.Image) -> Image.Image:
    """Decode an open image as RGB, with 16-bit grey scaled to 8 bits, and close it.

    Takes the first frame of an animation, drops transparency and ignores the orientation in EXIF, as timm does. Raises
    the errors of Pillow's decoders.
    """
    with image:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):  # Pillow would clip everything above 255 to white
            return image.convert("I").point(lambda value: value * (1 / 257)).convert("RGB")
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()  # instead of `convert`, which would copy it
        return image


def try_read(split: LazySplit, index: int) -> Image.Image | BadImage:
    """Decode an image of a split, or return its fault."""
    with strict_decoders():
        return attempt(split, index, lambda: read_image(split.open(index)))


class FileImages(Dataset[Sample]):
    """The images of a split as a torch data set, read by batches of keys (epoch, index)."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: Keys) -> list[Sample]:
        """Return for each key the uint8 image (or its fault), its class and its index."""
        with strict_decoders():
            parts = [self._read(keys[at : at + OPEN_FILES]) for at in range(0, len(keys), OPEN_FILES)]
        images = [image for part in parts for image in part]
        labels = self.split.labels
        return [(image, int(labels[index]), index) for image, (_, index) in zip(images, keys, strict=True)]

    def _read(self, keys: Keys) -> list[Tensor | BadImage]:
        return [attempt(self.split, index, self._whole, index) for _, index in keys]

    def _whole(self, index: int) -> Tensor:
        return self.transform(read_image(self.split.open(index)))


class TrainingImages(FileImages):
    """Training images with the augmentation of single images; all keys of a batch are of one epoch."""

    def __init__(self, split: Split, augmentation: Augmentation) -> None:
        super().__init__(split, pixels_of)
        self.augmentation, self.preprocessing = augmentation, augmentation.preprocessing

    def _read(self, keys: Keys) -> list[Tensor | BadImage]:
        opened = [attempt(self.split, index, self.split.open, index) for _, index in keys]
        sizes = [(1, 1) if isinstance(image, BadImage) else image.size for image in opened]
        widths, heights = torch.tensor(sizes).unbind(1)
        (epoch,) = {epoch for epoch, _ in keys}
        boxes = self.augmentation.boxes(epoch, torch.tensor([index for _, index in keys]), heights, widths)
        return [
            image if isinstance(image, BadImage) else attempt(self.split, key[1], self._augment, image, box, *key)
            for key, image, box in zip(keys, opened, boxes.tolist(), strict=True)
        ]

    def _augment(self, image: Image.Image, box: list[int], epoch: int, index: int) -> Tensor:
        """Crop an opened image and apply timm's transform.

        A JPEG whose crop is at least twice, four or eight times the input size is decoded at that fraction of its size;
        the edges of the crop then fall on whole decoded pixels.
        """
        width, height = image.size
        coarser = min(box[2], box[3]) // self.preprocessing.size
        if coarser > 1:
            image.draft(None, (width // coarser, height // coarser))
        step = round(width / image.size[0])
        scaled = (box[0] / step, box[1] / step, box[2] / step, box[3] / step)
        pixels = np.asarray(read_image(image))
        cropped = crop_pixels(pixels, scaled, self.preprocessing.size, self.preprocessing.interpolation)
        return self.augmentation.transform(cropped, epoch, index)


def pixels_of(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 `(3, H, W)`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
