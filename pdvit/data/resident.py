"""Small sets of image files on the device: decoded once, and kept as uint8 tensors."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from pdvit.data.augment import Augmentation
from pdvit.data.images import FileImages, describe_bad, pixels_of
from pdvit.data.loader import LoaderConfig, decode
from pdvit.data.sources.split import ArraySplit, Source, Split, image_size
from pdvit.errors import UserError

# A set may take this fraction of the memory of the device, or of the machine for the CPU.
MEMORY_FRACTION = 1 / 8
PROGRESS_SECONDS = 5.0
DECODE_BATCH = 256
Size = tuple[int, int]
WHERE = "data.resident (--resident)"


def choose(source: Source, loader: LoaderConfig, augmentation: Augmentation, setting: str) -> tuple[Size | None, str]:
    """Return width and height of the training images on the device (None: not there), and the reason.

    `setting` is auto, on or off. auto keeps images on the device if nothing is lost: all training images have one size,
    at most that of the model, their pixels take at most an eighth of the memory, and no augmentation works on single
    images. Raises UserError if `on` is impossible.
    """
    if setting == "off":
        return None, "--resident off"
    train, side, device = source.splits["train"], loader.preprocessing.size, loader.device
    sizes = filter(None, (image_size(train, index) for index in range(len(train))))  # bad images: found by the decoding
    size = next(sizes, (side, side))
    small, held_out = max(size) <= side, sum(map(len, source.splits.values())) - len(train)
    needed = 3 * ((math.prod(size) if small else side * side) * len(train) + side * side * held_out)
    memory = memory_of(device) // (loader.processes if device.type == "cpu" else 1)
    limit = memory if setting == "on" else memory * MEMORY_FRACTION
    if augmentation.per_image:
        problem = "RandAugment or colour jitter, image by image"
    elif needed > limit:
        problem = f"{needed / 1e9:.1f} GB of pixels are more than {limit / 1e9:.1f} GB of memory"
    elif setting == "on":
        same = small and all(other == size for other in sizes)
        return (size, "--resident on") if same else ((side, side), "--resident on, scaled and cropped once")
    elif not small:
        problem = f"images of {size[0]}x{size[1]} are larger than the model's {side}x{side}"
    elif other := next((other for other in sizes if other != size), None):
        problem = f"sizes differ: {size[0]}x{size[1]} and {other[0]}x{other[1]}"
    else:
        return size, f"all are {size[0]}x{size[1]}"
    if setting == "on":
        raise UserError(f"the images can't be kept on {device}: {problem}", WHERE, "use --resident off")
    return None, problem


def resident(
    source: Source, loader: LoaderConfig, augmentation: Augmentation, setting: str, log: Callable[[str], None]
) -> Source:
    """Return the source with its image files on the device if so decided; log the decision and its reason.

    Held-out images are kept after their evaluation transform, so their pixels are those of the workers. Raises
    UserError with the names of images that do not decode; if they are skipped, workers decode as before.
    """
    by_workers = f"by {loader.workers} worker processes"
    if all(isinstance(split, ArraySplit) for split in source.splits.values()):
        here = f"in memory, augmented at every step {by_workers}" if augmentation.per_image else f"on {loader.device}"
        log(f"images: {here}")
        return source
    size, reason = choose(source, loader, augmentation, setting)
    if size is None:
        log(f"images: decoded at every step {by_workers} ({reason})")
        return source
    preprocessing, splits = loader.preprocessing, dict[str, Split]()
    whole = replace(preprocessing, crop_pct=1.0, crop_mode="center").evaluation()
    stored = whole if size == (preprocessing.size, preprocessing.size) else pixels_of
    for name, split in source.splits.items():
        if not isinstance(split, ArraySplit):
            transform = stored if name == "train" else preprocessing.evaluation()
            images = _decoded(FileImages(split, transform), loader, name, log)
            if loader.bad.found:  # skipped: their replacements are chosen step by step
                if setting == "on":
                    what = f"images that do not decode can't be kept: {describe_bad(loader.bad.found)}"
                    raise UserError(what, WHERE, "delete them, or use --resident off")
                log(f"images: decoded at every step {by_workers} (some do not decode)")
                return source
            split = ArraySplit(images.to(loader.device), split.labels.to(loader.device))
        splits[name] = split
    total = sum(split.images.nbytes for split in splits.values() if isinstance(split, ArraySplit))
    log(f"images: on {loader.device}, {total / 1e6:,.0f} MB ({reason})")
    return replace(source, splits=splits)


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


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
