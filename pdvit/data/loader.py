"""Batches by step: the images of step t are a function of the seed and t, so any step is a start of equal cost.

A batch is the same from worker processes and from a resident set: image files decoded once, on the device as uint8.
"""

import atexit
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import count, tee
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from pdvit.data.augment import Augmentation
from pdvit.data.images import BadImage, BadImages, Keys, Sample, Samples, pixels_of, read_crops, read_whole, refuse_bad
from pdvit.data.mixing import Mixing
from pdvit.data.preprocessing import Preprocessing, copy_to
from pdvit.data.randomness import fold
from pdvit.data.sources.split import ArraySplit, Source, Split, image_size
from pdvit.errors import RunFailed, UserError

Raw = tuple[Tensor, Tensor, Tensor]  # uint8 images, class indices (of images, or of their pixels), sample indices
Steps = Iterator[tuple[int, Tensor]]  # epoch and sample indices of each step
Size = tuple[int, int]

# A resident set may take this fraction of the memory of the device, or of the machine for the CPU.
MEMORY_FRACTION = 1 / 8
DECODE_BATCH = 256
LOGGED = 32  # batches between two progress messages
# Open files for each worker (pipes and shared batches), and for everything else; bytes of /dev/shm that are left.
FILES_PER_WORKER, OTHER_FILES, OTHER_SHARED = 8, 16, 2**19
MAX_WORKERS = 16  # by default: each holds two batches in shared memory
SHARED_BYTES = 2**16  # smaller arrays go through a pipe, which is faster


@dataclass(frozen=True)
class Batch:
    """One batch on the device."""

    images: Tensor  # normalised `(B, 3, H, W)`, float32
    targets: Tensor  # classes `(B,)`; after mixing probabilities `(B, C)`; of pixels `(B, H, W)`, 255 if one has none
    index: Tensor  # sample indices in the split, `(B,)`
    patch_targets: Tensor | None = None  # class of every patch `(B, N)`; None without patch labels
    weights: Tensor | None = None  # of scheduled terms: factors `(B, T)` with equal rows, so they split like images
    replaced: Tensor | None = None  # whether an image replaces one that does not decode; None if such images are errors

    def __len__(self) -> int:
        return len(self.images)

    def take(self, chosen: slice | Tensor) -> "Batch":
        """Return the images at these places, with all that belongs to them."""
        return Batch(**{name: value[chosen] for name, value in vars(self).items() if value is not None})

    def repeat(self, size: int) -> "Batch":
        """Return a batch of `size` images, a repetition of its own."""
        return self.take(torch.arange(size) % len(self))

    def split(self, size: int) -> list["Batch"]:
        """Split into batches of `size` images; the last may be smaller."""
        return [self.take(slice(start, start + size)) for start in range(0, len(self), size)]


@dataclass(frozen=True)
class LoaderConfig:
    """The settings of the loader of one rank."""

    batch_size: int  # of all ranks together
    seed: int
    workers: int | None  # None: see `worker_count`
    device: torch.device
    preprocessing: Preprocessing
    eval_batch: int | None = None  # maximum of images in a forward pass in evaluation; None: those of a training step
    rank: int = 0
    processes: int = 1
    bad: BadImages = field(default_factory=BadImages)

    @property
    def worker_count(self) -> int:
        """The worker processes of this rank; unset, one for each of its cores, which ranks of a machine share."""
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(max(1, cores), MAX_WORKERS) if self.workers is None else self.workers

    @property
    def per_pass(self) -> int:
        """The maximum number of images, or windows of them, of a forward pass of this rank in evaluation."""
        return max(1, min(self.batch_size // self.processes, self.eval_batch or self.batch_size))

    def share(self, count: int) -> tuple[int, int]:
        """Return where the part of this rank of `count` items begins and ends; sizes differ by at most one."""
        return count * self.rank // self.processes, count * (self.rank + 1) // self.processes


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Return the full batches of one epoch; raises UserError if there are none."""
    if len(split) < batch_size:
        what = f"{len(split)} training images are fewer than one batch of {batch_size}"
        raise UserError(what, "data.batch_size (--batch-size)", f"choose a batch size of at most {len(split)}")
    return len(split) // batch_size


def train_batches(
    split: Split, loader: LoaderConfig, augmentation: Augmentation, mixing: Mixing, start: int
) -> Generator[Batch]:
    """Yield this rank's part of steps start, start + 1, ...; an epoch drops its last, incomplete batch."""
    steps, per_epoch = step_indices(len(split), loader, start, mixing), steps_per_epoch(split, loader.batch_size)
    batches: Iterator[Batch]
    if isinstance(split, ArraySplit) and not augmentation.per_image:
        pixels, labels = split.images.to(loader.device), split.labels.to(loader.device)
        if not augmentation.config.scale or max(pixels.shape[2:]) > loader.preprocessing.size:  # a crop only scales up
            pixels = loader.preprocessing.fit(pixels)
        chosen = ((epoch, index, index.to(loader.device, non_blocking=True)) for epoch, index in steps)
        batches = (Batch(augmentation.crop(pixels[at], epoch, index), labels[at], index) for epoch, index, at in chosen)
    else:
        batches = from_workers(Samples(split, partial(read_crops, augmentation)), loader, steps)
    part = range(*loader.share(loader.batch_size))
    for step, batch in zip(count(start), batches, strict=False):
        images = augmentation(batch.images, step // per_epoch, batch.index)
        images, targets, patch_targets = mixing.mix(images, batch.targets, loader.seed, step, loader.batch_size, part)
        own = batch.take(slice(len(batch) - len(part), None))
        yield replace(own, images=images, targets=targets, patch_targets=patch_targets)


def eval_batches(split: Split, loader: LoaderConfig, shared: bool = False) -> Iterator[Batch]:
    """Yield each image of this rank's part of a split exactly once, in order, without augmentation.

    With `shared`, ranks take whole batches of a single process in turn, possibly none: for results that depend on the
    images of a batch, computed by ranks that do not wait for one another. Images that do not decode are left out if
    they are skipped. Raises UserError if a batch of several ranks that is not shared has no image left.
    """
    if shared:
        chunks = torch.arange(len(split)).tensor_split(max(1, -(-len(split) // loader.batch_size)))
        chunks, loader = chunks[loader.rank :: loader.processes], replace(loader, rank=0, processes=1)
    else:
        fewest, most = len(split) // loader.processes, -(-len(split) // loader.processes)
        # the same number of batches on all ranks, as FSDP needs, and none without an image
        batches = max(1, min(-(-most // loader.per_pass), fewest))
        chunks = torch.arange(*loader.share(len(split))).tensor_split(batches)
    raw: Iterator[Raw]
    if isinstance(split, ArraySplit):
        raw = ((loader.preprocessing.fit(split.images[i].to(loader.device)), split.labels[i], i) for i in chunks)
    else:
        keys = [(-1, chunk.tolist()) for chunk in chunks]
        raw = decode(Samples(split, partial(read_whole, loader.preprocessing.evaluation())), loader, keys)
    for images, labels, index in raw:
        yield Batch(loader.preprocessing.normalise(images), labels.to(loader.device), index)


def step_indices(size: int, loader: LoaderConfig, start: int, mixing: Mixing | None = None) -> Steps:
    """Yield (epoch, indices) for every step from `start` on: this rank's part, and the partners that it mixes in."""
    batch_size, part, order = loader.batch_size, range(*loader.share(loader.batch_size)), torch.empty(0)
    for step in count(start):
        epoch, position = divmod(step, size // batch_size)
        if step == start or not position:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(fold(loader.seed, epoch)))
        whole = order[position * batch_size : (position + 1) * batch_size]
        yield epoch, whole[mixing.held(loader.seed, step, batch_size, part) if mixing else list(part)]


def from_workers(data: Samples, loader: LoaderConfig, steps: Steps) -> Iterator[Batch]:
    """Yield batches of uint8 training images that worker processes decode and crop."""
    steps, order = tee(steps)
    keys = ((epoch, indices.tolist()) for epoch, indices in steps)
    data = replace(data, skip=loader.bad.skip)
    for (_, planned), (images, labels, index) in zip(order, decode(data, loader, keys), strict=False):
        replaced = (index != planned).to(loader.device, non_blocking=True) if loader.bad.skip else None
        yield Batch(images, labels, index, replaced=replaced)


def decode(data: Samples, loader: LoaderConfig, keys: Iterable[Keys]) -> Iterator[Raw]:
    """Yield decoded batches on the loader's device, except for the indices.

    UserError with the names of images that do not decode, RunFailed if a worker fails.
    """
    with _worker_errors() if loader.worker_count else nullcontext():
        batches = _start_workers(data, loader, keys)
        try:
            for batch, bad in batches:
                loader.bad.add(bad)
                if batch is not None:
                    if isinstance(batch[0], np.ndarray) and batch[0].nbytes >= SHARED_BYTES:
                        _note("batches go through pipes, which is slower: /dev/shm is too small")
                    images, labels, index = map(torch.as_tensor, batch)
                    yield *copy_to(loader.device, images, labels), index
                elif loader.processes > 1 or data.skip:
                    # ranks must run the same number of batches, and training needs every one
                    refuse_bad(loader.bad.found, "too many to skip: replace them")
        finally:
            del batches  # ends the workers now; as part of an error's traceback torch would wait 5 s for each


def _start_workers(data: Samples, loader: LoaderConfig, keys: Iterable[Any]) -> Iterator[Any]:
    """Return torch's iterator over batches, without workers where they would lack open files or shared memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - psutil.Process().num_fds() - OTHER_FILES
    wanted = min(loader.worker_count, len(keys)) if isinstance(keys, Sized) else loader.worker_count
    workers = min(wanted, max(0, files // FILES_PER_WORKER)) if _shared_memory() > 0 else 0
    if workers < wanted:
        _note(f"{workers} workers decode images: /dev/shm or the limit of open files (ulimit -n) is too small for more")
    with warnings.catch_warnings():  # more workers than cores are the user's choice
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        data_loader = DataLoader(
            data,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else every iteration draws from the process generator, which drop path uses
            pin_memory=loader.device.type == "cuda",
        )
        batches = iter(data_loader)
    watch = signal.getsignal(signal.SIGCHLD)  # torch's raises where a worker died
    if callable(watch) and not hasattr(watch, "__wrapped__"):
        with suppress(ValueError):  # only the main thread can
            signal.signal(signal.SIGCHLD, _worker_errors()(watch))
    return batches


@contextmanager
def _worker_errors() -> Iterator[None]:
    """Turn the error or the death of a worker, as torch raises it, into a RunFailed."""
    try:
        yield
    except Exception as error:
        if not ("DataLoader worker" in str(error) or isinstance(error, OSError | MemoryError)):
            raise
        what = f"a process that decodes images failed: {str(error).strip().rpartition(chr(10))[2]}"
        tip = "use fewer --workers: the kernel ends processes if memory runs out"
        raise RunFailed(what, tip) from error


@cache
def _note(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def _shared_memory() -> int:
    """Return the free bytes of shared memory, less what processes need; macOS has no such limit."""
    return shutil.disk_usage("/dev/shm").free - OTHER_SHARED if os.path.isdir("/dev/shm") else 2**62


@atexit.register
def _end_workers() -> None:
    """Kill workers that an error left behind: Python would wait for them at exit, and they ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise, below the error that is shown
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _begin_worker(_: int) -> None:
    """Ignore signals to all processes of a terminal or a job: the main one handles them, and torch ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def end(error: Exception, _: object) -> None:  # else the run waits for ever for a batch that can't be sent
        print(f"error: a batch can't be sent: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _exit_with(parent: int) -> None:
    """End this worker when its parent is gone: a batch that waits in a full pipe would keep it for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _collate(samples: list[Sample]) -> tuple[Any, list[BadImage]]:
    """Stack the images of a batch that decode, if any, and list those that do not."""
    bad = [image for image, _, _ in samples if isinstance(image, BadImage)]
    sound = [(image, label, index) for image, label, index in samples if isinstance(image, Tensor)]
    if not sound:
        return None, bad
    images, labels, indices = zip(*sound, strict=True)
    stacked = torch.stack(images), torch.stack([torch.as_tensor(label) for label in labels]), torch.tensor(indices)
    return tuple(map(_to_send, stacked)) if get_worker_info() else stacked, bad


def _to_send(tensor: Tensor) -> Tensor | np.ndarray:
    """Move a worker's tensor to shared memory, half of which is left to others; else return it as an array."""
    with suppress(RuntimeError):  # another process was faster
        if SHARED_BYTES <= tensor.nbytes < _shared_memory() / 2:
            tensor.share_memory_()
            return tensor
    return tensor.numpy()


def resident(
    source: Source, loader: LoaderConfig, augmentation: Augmentation, setting: str, log: Callable[[str], None]
) -> Source:
    """Return the source with its image files on the device if so decided; log the decision and its reason.

    `setting` is auto, on or off. Held-out images are kept after their evaluation transform, so their pixels are those
    of the workers. Workers decode if bad images are skipped; else these, or an impossible `on`, raise UserError.
    """
    if isinstance(source.splits["train"], ArraySplit):
        in_memory = "in memory, augmented at every step by {} worker processes"
        here = in_memory.format(loader.worker_count) if augmentation.per_image else f"on {loader.device}"
        log(f"images: {here}")
        return source
    size, reason = (None, "--resident off") if setting == "off" else _choose(source, loader, augmentation, setting)
    if size is not None:
        preprocessing, splits, total = loader.preprocessing, dict[str, Split](), 0
        whole = replace(preprocessing, crop_pct=1.0, crop_mode="center").evaluation()
        stored = whole if size == (preprocessing.size, preprocessing.size) else pixels_of
        for name, split in source.splits.items():
            transform = stored if name == "train" else preprocessing.evaluation()
            images = _decoded(Samples(split, partial(read_whole, transform)), loader, name, log)
            if loader.bad.found:  # skipped: their replacements are chosen step by step
                break
            total += images.nbytes
            splits[name] = ArraySplit(images.to(loader.device), split.labels.to(loader.device))
        else:
            log(f"images: on {loader.device}, {total / 1e6:,.0f} MB ({reason})")
            return replace(source, splits=splits)
        if setting == "on":
            refuse_bad(loader.bad.found, "delete them, or use --resident off")
        reason = "some do not decode"
    log(f"images: decoded at every step by {loader.worker_count} worker processes ({reason})")
    return source


def _choose(source: Source, loader: LoaderConfig, augmentation: Augmentation, setting: str) -> tuple[Size | None, str]:
    """Return width and height of the training images on the device (None: not there), and the reason.

    auto keeps images on the device if nothing is lost: all training images have one size, at most that of the model,
    their pixels take at most an eighth of the memory, and no augmentation works on single images.
    """
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
        what = f"the images can't be kept on {device}: {problem}"
        raise UserError(what, "data.resident (--resident)", "use --resident off")
    return None, problem


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _decoded(data: Samples, loader: LoaderConfig, name: str, log: Callable[[str], None]) -> Tensor:
    """Decode every image of a split, in order: uint8 `(N, 3, H, W)` on the host; stops at one that does not decode."""
    keys = [(-1, part.tolist()) for part in torch.arange(len(data.split)).split(DECODE_BATCH)]
    images, loader = torch.empty(0, dtype=torch.uint8), replace(loader, processes=1, device=torch.device("cpu"))
    for step, (part, _, index) in enumerate(decode(data, loader, keys)):  # every rank reads all
        if loader.bad.found:
            break
        if not step:
            images = torch.empty(len(data.split), *part.shape[1:], dtype=torch.uint8)
        elif step % LOGGED == 0:
            log(f"decoding {name}: {step * DECODE_BATCH:,} of {len(data.split):,} images")
        images[index] = part
    return images
