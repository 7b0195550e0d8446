"""Batches, by step: what step t holds is a function of the seed and t, so starting at any step costs the same."""

import atexit
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pdvit.config.schema import AugmentConfig
from pdvit.data.augment.pipeline import Augmentation
from pdvit.data.bad_images import BadImage, BadImages, Sample, Substituted, refuse_bad
from pdvit.data.batch import Batch
from pdvit.data.mixing import Mixing
from pdvit.data.preprocessing import FileImages, Keys, Preprocessing, TrainingImages
from pdvit.data.randomness import epoch_order
from pdvit.data.sources import ArraySplit, LazySplit, Split
from pdvit.errors import UserError

# Uint8 images, class indices (of images, or of their pixels), sample indices.
Raw = tuple[Tensor, Tensor, Tensor]
# Epoch and sample indices of each step.
Steps = Iterator[tuple[int, Tensor]]


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made, for one run."""

    batch_size: int
    seed: int
    workers: int
    device: torch.device
    preprocessing: Preprocessing
    eval_batch: int | None = None
    """The most images of a forward pass when nothing is learned."""
    rank: int = 0
    processes: int = 1
    """How many share each batch, and which of them this is."""
    bad: BadImages = field(default_factory=BadImages)
    """What becomes of images that do not decode."""

    @property
    def per_pass(self) -> int:
        """The most images, or windows of them, of this process's forward passes when nothing is learned."""
        return max(1, min(self.batch_size // self.processes, self.eval_batch or self.batch_size))

    def share(self, count: int) -> tuple[int, int]:
        """Return where this process's part of `count` things begins and ends; the parts differ by at most one."""
        return count * self.rank // self.processes, count * (self.rank + 1) // self.processes


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Return the full batches of one epoch; UserError where there is not even one."""
    if len(split) < batch_size:
        raise UserError(
            f"{len(split)} training images are fewer than one batch of {batch_size}",
            "data.batch_size (--batch-size)",
            f"choose a batch size of at most {len(split)}",
        )
    return len(split) // batch_size


def augmentation_for(split: Split, how: LoaderConfig, augment: AugmentConfig) -> Augmentation:
    """Return what is done to the images of a split in training."""
    decoded = isinstance(split, LazySplit) or split.decoded
    return Augmentation.of(augment, decoded, how.preprocessing, how.seed)


def train_batches(
    split: Split, how: LoaderConfig, augment: AugmentConfig, mixing: Mixing, start: int
) -> Generator[Batch, None, None]:
    """Yield this process's share of steps start, start + 1, ...; what a short last batch would hold sits out."""
    augmentation = augmentation_for(split, how, augment)
    steps = step_indices(len(split), how, start, mixing)
    if isinstance(split, ArraySplit):
        raw = _resident(split, how, augmentation, steps)
    else:
        raw = from_workers(TrainingImages(split, augmentation), how, steps)
    per_epoch = steps_per_epoch(split, how.batch_size)
    order = step_indices(len(split), how, start, mixing)
    for step, (images, labels, index) in zip(count(start), raw, strict=False):
        batch = Batch(augmentation(images, step // per_epoch, index), labels, index)
        batch = mixing.mix(batch, how.seed, step, how.batch_size, range(*how.share(how.batch_size)))
        yield mark_replaced(batch, order, how) if how.bad.skip else batch


def mark_replaced(batch: Batch, order: Steps, how: LoaderConfig) -> Batch:
    """Say of a batch which images stand in for those that the order of the run wanted next."""
    wanted = next(order)[1][-len(batch) :]
    return replace(batch, replaced=(batch.index != wanted).to(how.device, non_blocking=True))


def eval_batches(split: Split, how: LoaderConfig) -> Iterator[Batch]:
    """Yield every image of this process's part of a split exactly once, in order, without augmentation.

    Images that do not decode are left out where they are to be skipped. Raises UserError where none of a batch is left
    that other processes have too.
    """
    least, most = len(split) // how.processes, -(-len(split) // how.processes)
    turns = max(
        1, min(-(-most // how.per_pass), least)
    )  # the same for all processes, as FSDP needs, and none without an image
    yield from _whole(split, how, torch.arange(*how.share(len(split))).tensor_split(turns))


def shared_batches(split: Split, how: LoaderConfig) -> Iterator[Batch]:
    """Yield those of a single process's `eval_batches` that are this one's: whole ones, in turn, perhaps none.

    For what depends on which images share a batch, and where processes do not wait for one another.
    """
    chunks = torch.arange(len(split)).tensor_split(max(1, -(-len(split) // how.batch_size)))
    yield from _whole(split, replace(how, rank=0, processes=1), chunks[how.rank :: how.processes])


def _whole(split: Split, how: LoaderConfig, chunks: Sequence[Tensor]) -> Iterator[Batch]:
    """Yield the images of each chunk of indices as a batch."""
    raw: Iterator[Raw]
    if isinstance(split, ArraySplit):
        fit = how.preprocessing.fit
        raw = ((fit(split.images[i].to(how.device)), split.labels[i], i) for i in chunks)
    else:
        keys = [[(-1, int(index)) for index in chunk] for chunk in chunks]
        raw = decode(FileImages(split, how.preprocessing.evaluation()), how, keys)
    for images, labels, index in raw:
        yield Batch(how.preprocessing.normalise(images.to(how.device)), labels.to(how.device), index)


def step_indices(size: int, how: LoaderConfig, start: int, mixing: Mixing | None = None) -> Steps:
    """Yield (epoch, indices) of what this process needs for every step from `start` on: its share, and what lends."""
    per_epoch, step, share = size // how.batch_size, start, range(*how.share(how.batch_size))
    while True:
        epoch, position = divmod(step, per_epoch)
        order = epoch_order(how.seed, epoch, size)
        for at in range(position, per_epoch):
            whole = order[at * how.batch_size : (at + 1) * how.batch_size]
            yield epoch, whole[mixing.held(how.seed, step, how.batch_size, share) if mixing else list(share)]
            step += 1


def _resident(split: ArraySplit, how: LoaderConfig, augmentation: Augmentation, steps: Steps) -> Iterator[Raw]:
    """Yield batches of a set that lives on the device as one uint8 tensor."""
    images, labels = split.images.to(how.device), split.labels.to(how.device)
    if augmentation.scale is None or max(images.shape[2:]) > how.preprocessing.size:  # a crop is never scaled down
        images = how.preprocessing.fit(images)
    for epoch, index in steps:
        chosen = index.to(how.device, non_blocking=True)
        yield augmentation.crop(images[chosen], epoch, index), labels[chosen], index


class _Keys(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys, from a function that starts a fresh iteration."""

    def __init__(self, start: Callable[[], Iterator[list[tuple[int, int]]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.start()


def from_workers(data: Dataset[Sample], how: LoaderConfig, steps: Steps) -> Iterator[Raw]:
    """Yield batches of training images that worker processes decode and crop."""
    keys = ([(epoch, int(index)) for index in indices] for epoch, indices in steps)
    if how.bad.skip:
        data = Substituted(data)
    for images, labels, index in decode(data, how, keys):
        yield images.to(how.device, non_blocking=True), labels.to(how.device, non_blocking=True), index


def decode(data: Dataset[Sample], how: LoaderConfig, keys: Iterable[Keys]) -> Iterator[Raw]:
    """Yield decoded batches for the keys; UserError naming the files that do not decode."""
    with warnings.catch_warnings():  # more workers than cores are the user's choice
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            data,
            batch_sampler=_Keys(lambda: iter(keys)),
            num_workers=how.workers,
            collate_fn=_collate,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # else every iteration draws from the process generator, which drop path uses
            pin_memory=how.device.type == "cuda",
        )
        batches = iter(loader)
    try:
        for batch, bad in batches:
            how.bad.meet(bad)
            if batch is not None:
                yield batch
            elif how.processes > 1 or isinstance(data, Substituted):
                # processes have to run the same number of batches, and training needs every one
                refuse_bad(how.bad.found, "too many to skip: replace them")
    finally:
        del batches  # ends the workers now; as part of an error's traceback torch would wait 5 s for each


@atexit.register
def _end_workers() -> None:
    """End workers that an error left behind: at exit Python would wait for them, and they ignore being asked."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise, below the error that is shown
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def leave_signals(_: int) -> None:
    """Let the main process decide what a signal to the whole group means; torch ends workers with their parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(samples: list[Sample]) -> tuple[Raw | None, list[BadImage]]:
    """Stack the images of a batch that decode, if there are any, and list those that do not."""
    bad = [image for image, _, _ in samples if isinstance(image, BadImage)]
    sound = [(image, label, index) for image, label, index in samples if isinstance(image, Tensor)]
    if not sound:
        return None, bad
    images, labels, indices = zip(*sound, strict=True)
    targets = torch.stack([torch.as_tensor(label) for label in labels])
    return (torch.stack(images), targets, torch.tensor(indices)), bad
