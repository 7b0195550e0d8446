"""Small sets of image files on the device: decoded once, and kept there as uint8 tensors."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pdvit.data.bad_images import BadImage, describe_bad
from pdvit.data.loader import LoaderConfig, decode
from pdvit.data.preprocessing import FileImages, Preprocessing, attempt, pixels_of, strict_decoders
from pdvit.data.sources import ArraySplit, LazySplit, Source, Split
from pdvit.errors import UserError

# A set may take one part in so many of the device's memory, or of the machine's where that is the device.
PART = 8
SECONDS = 5.0  # between lines of progress
BATCH = 256


@dataclass(frozen=True)
class Choice:
    """Where images are kept: height and width of the training images on the device (None: with workers), and why."""

    size: tuple[int, int] | None
    reason: str


def choose(source: Source, how: LoaderConfig, wanted: str) -> Choice:
    """Decide where the image files of a source are kept; `wanted` is auto, on or off.

    auto keeps them on the device where nothing is lost by it: all training images have one size, which is at most the
    model's, and the pixels take at most an eighth of the memory. Raises UserError where `on` can't be.
    """
    if wanted == "off":
        return Choice(None, "--resident off")
    side = how.preprocessing.size
    train = source.splits["train"]
    assert isinstance(train, LazySplit)
    sizes = _sizes(train)
    size = next(sizes, (side, side))
    small = max(size) <= side
    bytes_needed = _bytes(source, size if small else (side, side), side)
    limit = memory_of(how.device) // PART // (how.processes if how.device.type == "cpu" else 1)
    if wanted == "on":
        if bytes_needed > PART * limit:
            what = f"{bytes_needed / 1e9:.1f} GB of pixels are more than the memory of {how.device}"
            raise UserError(what, "data.resident (--resident)", "use --resident off")
        one = small and all(other == size for other in sizes)
        return Choice(size, "--resident on") if one else Choice((side, side), "--resident on, scaled and cropped once")
    if not small:
        return Choice(None, f"images of {size[1]}x{size[0]} are larger than the model's {side}x{side}")
    if bytes_needed > limit:
        return Choice(
            None, f"{bytes_needed / 1e9:.1f} GB of pixels are more than {limit / 1e9:.1f} GB, 1/{PART} of memory"
        )
    if other := next((other for other in sizes if other != size), None):
        return Choice(None, f"sizes differ: {size[1]}x{size[0]} and {other[1]}x{other[0]}")
    return Choice(size, f"all are {size[1]}x{size[0]}")


def resident(source: Source, how: LoaderConfig, wanted: str, say: Callable[[str], None]) -> Source:
    """Return the source with its image files on the device where that is chosen; say what was chosen, and why.

    Held-out images are kept as their evaluation transform leaves them, so their pixels are those that workers give.
    Raises UserError naming the images that do not decode; where they are to be skipped, workers go on as before.
    """
    if not any(isinstance(split, LazySplit) for split in source.splits.values()):
        say(f"images: on {how.device} from the start")
        return source
    choice = choose(source, how, wanted)
    if choice.size is None:
        say(f"images: decoded at every step by {how.workers} worker processes ({choice.reason})")
        return source
    splits: dict[str, Split] = {}
    for name, split in source.splits.items():
        if isinstance(split, LazySplit):
            stored = _stored(how.preprocessing, choice.size) if name == "train" else how.preprocessing.evaluation()
            images = _decoded(FileImages(split, stored), how, partial(_progress, say, name))
            if how.bad.found:  # to be skipped: what stands in for them is decided step by step
                return _with_bad(source, how, wanted, say)
            split = ArraySplit(images.to(how.device), split.labels.to(how.device), decoded=True)
        splits[name] = split
    total = sum(split.images.nbytes for split in splits.values() if isinstance(split, ArraySplit))
    say(f"images: on {how.device}, {total / 1e6:,.0f} MB ({choice.reason})")
    return replace(source, splits=splits)


def _with_bad(source: Source, how: LoaderConfig, wanted: str, say: Callable[[str], None]) -> Source:
    """Leave a source with images that do not decode to the workers; UserError where it is to be resident."""
    if wanted == "on":
        what = f"images that do not decode can't be kept: {describe_bad(how.bad.found)}"
        raise UserError(what, "data.resident (--resident)", "delete them, or use --resident off")
    say(f"images: decoded at every step by {how.workers} worker processes (some do not decode)")
    return source


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(source: Source, size: tuple[int, int], side: int) -> int:
    sizes = {name: size if name == "train" else (side, side) for name in source.splits}
    return sum(3 * height * width * len(source.splits[name]) for name, (height, width) in sizes.items())


def _sizes(split: LazySplit) -> Iterator[tuple[int, int]]:
    """Yield height and width of the images from their headers; what can't be read is left to the decoding."""
    with strict_decoders():
        for index in range(len(split)):
            size = attempt(split, index, _size, split, index)
            if not isinstance(size, BadImage):
                yield size


def _size(split: LazySplit, index: int) -> tuple[int, int]:
    with split.open(index) as image:
        return image.height, image.width


def _stored(preprocessing: Preprocessing, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """Return how a training image is stored: as it is or, where it has not that size, scaled and centre-cropped."""
    mode = v2.InterpolationMode(preprocessing.interpolation)
    fit = v2.Compose([v2.Resize(min(size), interpolation=mode, antialias=True), v2.CenterCrop(min(size))])
    return partial(_store, size, fit)  # it has to travel to worker processes


def _store(size: tuple[int, int], fit: v2.Compose, image: Image.Image) -> Tensor:
    return pixels_of(image if (image.height, image.width) == size else fit(image))


def _decoded(data: FileImages, how: LoaderConfig, progress: Callable[[int, int], None]) -> Tensor:
    """Decode every image of a split, in order: uint8 `(N, 3, H, W)` on the host; stops at one that does not decode."""
    keys = [[(-1, int(index)) for index in part] for part in torch.arange(len(data)).split(BATCH)]
    images = torch.empty(0, dtype=torch.uint8)
    told = time.monotonic()
    alone = replace(how, processes=1)  # every process reads all of it
    for part, _, index in decode(data, alone, keys):
        if how.bad.found:
            break
        if not len(images):
            images = torch.empty(len(data), *part.shape[1:], dtype=torch.uint8)
        images[index] = part
        if time.monotonic() > told + SECONDS:
            told = time.monotonic()
            progress(int(index[-1]) + 1, len(data))
    return images


def _progress(say: Callable[[str], None], name: str, done: int, total: int) -> None:
    say(f"decoding {name}: {done:,} of {total:,} images")
