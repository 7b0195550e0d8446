"""Small sets of image files on the device: decoded once, and kept as uint8 tensors."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms import v2

from pdvit.data.augment import Augmentation
from pdvit.data.images import BadImage, FileImages, attempt, describe_bad, strict_decoders
from pdvit.data.loader import LoaderConfig, decode
from pdvit.data.sources.split import ArraySplit, LazySplit, Source, Split
from pdvit.errors import UserError

# A set may take this fraction of the memory of the device, or of the machine for the CPU.
MEMORY_FRACTION = 1 / 8
PROGRESS_SECONDS = 5.0
DECODE_BATCH = 256
Size = tuple[int, int]
WHERE = "data.resident (--resident)"


def choose(source: Source, loader: LoaderConfig, augmentation: Augmentation, setting: str) -> tuple[Size | None, str]:
    """Return height and width of the training images on the device (None: not there), and the reason.

    `setting` is auto, on or off. auto keeps images on the device if nothing is lost: all training images have one size,
    at most that of the model, their pixels take at most an eighth of the memory, and no augmentation works on single
    images. Raises UserError if `on` is impossible.
    """
    if setting == "off":
        return None, "--resident off"
    if augmentation.per_image:
        if setting == "on":
            what = "RandAugment and colour jitter work on single images in the workers"
            raise UserError(what, WHERE, "use --resident off, or leave out --aa and --color-jitter")
        return None, "RandAugment or colour jitter, image by image"
    side = loader.preprocessing.size
    sizes = _sizes(source.splits["train"])
    size = next(sizes, (side, side))
    small = max(size) <= side
    height, width = size if small else (side, side)
    held_out = sum(len(split) for name, split in source.splits.items() if name != "train")
    needed = 3 * (height * width * len(source.splits["train"]) + side * side * held_out)
    memory = memory_of(loader.device) // (loader.processes if loader.device.type == "cpu" else 1)
    if setting == "on":
        if needed > memory:
            what = f"{needed / 1e9:.1f} GB of pixels are more than the memory of {loader.device}"
            raise UserError(what, WHERE, "use --resident off")
        if small and all(other == size for other in sizes):
            return size, "--resident on"
        return (side, side), "--resident on, scaled and cropped once"
    if not small:
        return None, f"images of {size[1]}x{size[0]} are larger than the model's {side}x{side}"
    if needed > (limit := memory * MEMORY_FRACTION):
        return None, f"{needed / 1e9:.1f} GB of pixels are more than {limit / 1e9:.1f} GB, 1/8 of memory"
    if other := next((other for other in sizes if other != size), None):
        return None, f"sizes differ: {size[1]}x{size[0]} and {other[1]}x{other[0]}"
    return size, f"all are {size[1]}x{size[0]}"


def resident(
    source: Source, loader: LoaderConfig, augmentation: Augmentation, setting: str, log: Callable[[str], None]
) -> Source:
    """Return the source with its image files on the device if so decided; log the decision and its reason.

    Held-out images are kept after their evaluation transform, so their pixels are those of the workers. Raises
    UserError with the names of images that do not decode; if they are skipped, workers decode as before.
    """
    by_workers = f"by {loader.workers} worker processes"
    if not any(isinstance(split, LazySplit) for split in source.splits.values()):
        here = f"in memory, augmented at every step {by_workers}" if augmentation.per_image else f"on {loader.device}"
        log(f"images: {here}")
        return source
    size, reason = choose(source, loader, augmentation, setting)
    if size is None:
        log(f"images: decoded at every step {by_workers} ({reason})")
        return source
    mode = v2.InterpolationMode(loader.preprocessing.interpolation)
    stored = v2.Compose(  # changes nothing in images of this size
        [v2.Resize(min(size), interpolation=mode, antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
    )
    splits: dict[str, Split] = {}
    for name, split in source.splits.items():
        if isinstance(split, LazySplit):
            transform = stored if name == "train" else loader.preprocessing.evaluation()
            images = _decoded(FileImages(split, transform), loader, name, log)
            if loader.bad.found:  # skipped: their replacements are chosen step by step
                if setting == "on":
                    what = f"images that do not decode can't be kept: {describe_bad(loader.bad.found)}"
                    raise UserError(what, WHERE, "delete them, or use --resident off")
                log(f"images: decoded at every step {by_workers} (some do not decode)")
                return source
            split = ArraySplit(images.to(loader.device), split.labels.to(loader.device), decoded=True)
        splits[name] = split
    total = sum(split.images.nbytes for split in splits.values() if isinstance(split, ArraySplit))
    log(f"images: on {loader.device}, {total / 1e6:,.0f} MB ({reason})")
    return replace(source, splits=splits)


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sizes(split: Split) -> Iterator[Size]:
    """Yield height and width of the images from their headers; bad images are left to the decoding."""
    for index in range(len(split)):
        with strict_decoders():
            image = attempt(split, index, split.open, index)
        if not isinstance(image, BadImage):
            with image:
                yield image.height, image.width


def _decoded(data: FileImages, loader: LoaderConfig, name: str, log: Callable[[str], None]) -> Tensor:
    """Decode every image of a split, in order: uint8 `(N, 3, H, W)` on the host; stops at one that does not decode."""
    keys = [[(-1, int(index)) for index in part] for part in torch.arange(len(data)).split(DECODE_BATCH)]
    images = torch.empty(0, dtype=torch.uint8)
    logged = time.monotonic()
    for part, _, index in decode(data, replace(loader, processes=1), keys):  # every rank reads all of it
        if loader.bad.found:
            break
        if not len(images):
            images = torch.empty(len(data), *part.shape[1:], dtype=torch.uint8)
        images[index] = part
        if time.monotonic() > logged + PROGRESS_SECONDS:
            logged = time.monotonic()
            log(f"decoding {name}: {int(index[-1]) + 1:,} of {len(data):,} images")
    return images
