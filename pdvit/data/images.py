"""Image files as torch data sets of uint8 tensors, and the policy for those that do not decode: error or skip."""

import errno
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from pdvit.data.augment import Augmentation, crop_pixels
from pdvit.data.sources.split import MaskSplit, Split, upright, upright_size
from pdvit.errors import UserError, printable

NAMED = 10  # images named in a message; the others are counted
RUN_TIP = "replace what is named, or skip it: --on-bad-image skip, in Python on_bad_image='skip'"
RUN_TIP += " (to resume a run: --change data.on_bad_image=skip)"
MASK_TIP = "fix it, or add its values to the table of classes (--classes); --check-masks names all of them"
OUT_OF_RESOURCES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # errors of the machine, not of the image
Result = TypeVar("Result")
pixels_of: Callable[[Image.Image], Tensor] = functional.pil_to_tensor  # of RGB: uint8 `(3, H, W)`
Pair = tuple[Image.Image, Tensor]  # of an image and its mask
Keys = tuple[int, list[int]]  # an epoch and the indices of images
# A uint8 image `(3, H, W)` or its fault, its class (or the class of every pixel) and its index.
Sample = tuple["Tensor | BadImage", int | Tensor, int]


@dataclass(frozen=True)
class BadImage:
    """An image that does not decode: returned, not raised, so that the main process can name all of a batch."""

    name: str
    reason: str


class BadMask(BadImage):
    """A mask that does not fit its image or the classes; always an error, because other masks may be wrong too."""


@dataclass
class BadImages:
    """The policy (`skip` or error) for images that do not decode, and the reasons of those `found`, by name."""

    skip: bool = False
    found: dict[str, str] = field(default_factory=dict)

    def add(self, bad: Sequence[BadImage]) -> None:
        """Record images that do not decode; raises UserError unless they are skipped, and for every bad mask."""
        new = {item.name: item.reason for item in bad}
        refuse_bad({item.name: item.reason for item in bad if isinstance(item, BadMask)}, MASK_TIP, "mask")
        if not self.skip:
            refuse_bad(new)
        self.found |= new


def refuse_bad(bad: Mapping[str, str], tip: str = RUN_TIP, what: str = "image") -> None:
    """Raise a UserError that names images, or masks, that can't be used (reason by name), if there are any."""
    if bad:
        fault = ("do not decode" if len(bad) > 1 else "does not decode") if what == "image" else "can't be used"
        raise UserError(f"{len(bad)} {what}{'s' * (len(bad) > 1)} {fault}", describe_bad(bad), tip)


def describe_bad(bad: Mapping[str, str]) -> str:
    """Return up to ten names with their reasons, and the number of the others."""
    listed = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:NAMED])
    return printable(listed + (f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""))


def attempt(split: Split, index: int, read: Callable[[int], Result]) -> Result | BadImage:
    """Return `read(index)`, which decodes image `index` of the split, or its fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # before the pixels are decoded
            warnings.filterwarnings("ignore", message="Palette images with Transparency")
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return read(index)
    except UnidentifiedImageError:
        return BadImage(split.name(index), "not an image")
    except Exception as error:  # decoders raise almost any error on a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in OUT_OF_RESOURCES:
            raise
        return BadImage(split.name(index), str(error) or type(error).__name__)


def read_image(image: Image.Image) -> Image.Image:
    """Decode an open image (its first frame) to upright RGB, deep grey scaled to 8 bits; raises Pillow's errors."""
    with image:
        image = upright(image)
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("pixels of 32 bits, or with a sign, have no known range")
        if image.mode.startswith("I"):  # Pillow would clip everything above 255 to white
            tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
            scale = 255 / (2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1)
            scale, black = (-scale, 255) if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else (scale, 0)
            image = image.convert("I").point(lambda value: value * scale + black)
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def try_read(split: Split, index: int) -> Image.Image | BadImage:
    """Decode an image of a split, or return its fault."""
    return attempt(split, index, lambda index: read_image(split.open(index)))


def try_mask(split: MaskSplit, index: int, size: tuple[int, int] | None) -> Tensor | BadMask:
    """Decode a mask, or return its fault; `size` is width and height of its image, None if that does not decode."""
    mask = attempt(split, index, split.mask)
    if isinstance(mask, BadImage):
        return BadMask(split.mask_name(index), mask.reason)
    height, width = mask.shape
    if size is None or size == (width, height):
        return mask
    return BadMask(split.mask_name(index), f"it is {width}x{height}, its image {size[0]}x{size[1]}")


def decode_all(split: Split, bad: BadImages) -> Iterator[tuple[int, Image.Image]]:
    """Yield index and image of every image that decodes, in order; `bad` has the policy for the others."""
    for index in range(len(split)):
        image = try_read(split, index)
        if isinstance(image, BadImage):
            bad.add([image])
        else:
            yield index, image


@dataclass(frozen=True)
class Samples(Dataset[Sample]):
    """The samples of a split, by an epoch and their indices, as `read` returns them.

    With `skip` the next sound image replaces one that does not decode. It is a function of the index, and its
    augmentation of seed, epoch and its own index, so steps can be repeated.
    """

    split: Split
    read: Callable[[Any, int, list[int]], list[Sample]]  # of the split, the epoch and the indices
    skip: bool = False

    def __getitems__(self, keys: Keys) -> list[Sample]:
        """Return a sample for each index; with `skip` a sound one, followed by the bad ones, to be counted."""
        epoch, indices = keys
        samples, bad = self.read(self.split, epoch, indices), list[Sample]()
        for place, index in enumerate(indices if self.skip else ()):
            for tried in range(1, len(self.split) + 1):
                if not isinstance(samples[place][0], BadImage):
                    break
                bad.append(samples[place])
                (samples[place],) = self.read(self.split, epoch, [(index + tried) % len(self.split)])
        return samples + bad


def read_whole(
    transform: Callable[[Image.Image], Tensor], split: Split, epoch: int, indices: list[int]
) -> list[Sample]:
    """Return transformed images, uint8 (or their faults), with class and index."""

    def read(index: int) -> Tensor:
        return transform(read_image(split.open(index)))

    return [(attempt(split, index, read), int(split.labels[index]), index) for index in indices]


def read_crops(augmentation: Augmentation, split: Split, epoch: int, indices: list[int]) -> list[Sample]:
    """Return cropped images after timm's transform, uint8 (or their faults), with class and index.

    A JPEG with a crop of two, four or eight times the input is decoded that much smaller; edges are rounded to it.
    """
    preprocessing = augmentation.preprocessing
    crop_boxes = dict(zip(indices, augmentation.crop_boxes(epoch, torch.tensor(indices)), strict=True))

    def read(index: int) -> Tensor:
        image = split.open(index)
        width, height = image.size
        box = crop_boxes[index](*reversed(upright_size(image)))
        if (coarser := min(box[2:]) // preprocessing.size) > 1:
            image.draft(None, (width // coarser, height // coarser))
        step = round(width / image.size[0])
        pixels, scaled = np.asarray(read_image(image)), [side / step for side in box]
        cropped = crop_pixels(pixels, scaled, preprocessing.size, preprocessing.interpolation)
        return augmentation.transform(cropped, epoch, index)

    return [(attempt(split, index, read), int(split.labels[index]), index) for index in indices]
