"""Measuring one checkpoint for `pdvit analyze`: its images, its layers, random weights beside it, and other models."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pdvit.analysis import Analysis, cka_between, measure, published, statement, with_random
from pdvit.analysis.measure import choose
from pdvit.cli.checkpoint import config_of, with_progress
from pdvit.config import build
from pdvit.config.schema import Config
from pdvit.data.bad_images import BadImages
from pdvit.data.batch import Batch
from pdvit.data.loader import LoaderConfig, shared_batches
from pdvit.data.pictures import Pictures, held_out, named, sample_photographs
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources import ArraySplit
from pdvit.engine.device import choose_device, device_name, is_out_of_memory
from pdvit.errors import UserError
from pdvit.models.layers import places_of
from pdvit.models.weights import Loaded, load

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

    from pdvit.engine.display import RunConsole
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.interrupts import StopRequest

T = TypeVar("T")
# Images that a model with random weights is measured on.
REFERENCE = 32


@dataclass(frozen=True)
class Asked:
    """What the command line asks of every checkpoint."""

    images: list[str]
    metrics: list[str]
    limit: int
    model: str | None
    weights: str | None
    batch_size: int
    workers: int
    device: str
    pairs: str
    on_bad_image: str | None


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is ready to be measured."""

    loaded: Loaded
    pictures: Pictures
    loading: LoaderConfig


@dataclass(frozen=True)
class Measured:
    """What came out of one checkpoint.

    Attributes:
        path: how the user names it.
        name: what it is called.
        pictures: what it was measured on.
        analysis: the numbers.
        facts: what exactly was measured.
        between: CKA between the layers of the first checkpoint and its own, where that was asked for and could be.
    """

    path: str
    name: str
    pictures: Pictures
    analysis: Analysis
    facts: dict[str, Any]
    between: "pd.DataFrame | None" = None


class Until:
    """Hands items on until somebody asks to stop, and knows whether it came to that."""

    def __init__(self, stop: "StopRequest") -> None:
        self.stop, self.cut, self.passed = stop, False, 0

    def __call__(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and none after the request."""
        for item in items:
            if self.stop:
                self.cut = True
                return
            self.passed += 1
            yield item


def measure_checkpoint(
    path: str, asked: Asked, first: Measured | None, console: "RunConsole", ranks: "Ranks", stop: "StopRequest"
) -> Measured | None:
    """Load, measure and describe a checkpoint, and compare it with the first; None where it stopped before an image."""
    choose(asked.metrics)  # raises for a name that there is not, before anything is loaded
    subject = prepare(path, asked, ranks)
    model, until = subject.loaded.model, Until(stop)
    try:
        images = until(_images(subject, console, subject.loaded.name))
        analysis = measure(model, images, asked.metrics, subject.loaded.name, asked.pairs, ranks)
    except UserError:
        if any(ranks.all_gather(until.cut)) and not sum(ranks.all_gather(until.passed)):
            return None
        raise
    stopped = any(ranks.all_gather(until.cut))
    total = len(subject.pictures.split)
    why = f"on request, after {analysis.images} of {total} images" if stopped else None
    if not stopped and "similarity" in choose(asked.metrics):
        analysis = _with_random(analysis, subject, asked, console, ranks, stop)
    between = None
    if first is not None and "cka" in choose(asked.metrics):
        between, note = _between(first, subject, asked, console, ranks, stop)
        analysis = replace(analysis, notes=[*analysis.notes, note])
    bad = {name for found in ranks.all_gather(set(subject.loading.bad.found)) for name in found}
    facts = statement(
        analysis,
        _described(subject, len(bad)),
        max(place.prefix for place in places_of(model).values()),
        subject.loaded.weights,
        path,
        device_name(subject.loading.device),
        stopped=why,
        published=published(subject.loaded.architecture, sum(name.startswith("block") for name in analysis.layers)),
    )
    return Measured(path, subject.loaded.name, subject.pictures, analysis, facts, between)


def prepare(path: str, asked: Asked, ranks: "Ranks") -> Subject:
    """Load a checkpoint to the device and choose its images; UserError, of all processes, where one of them can't."""
    with ranks.failing_together():
        loaded = load(path, asked.model, asked.weights)
        device = choose_device(asked.device, ranks.local_rank if ranks.world_size > 1 else None)
        placed(loaded.model, device, path)
        given = {"on_bad_image": asked.on_bad_image} if asked.on_bad_image is not None else {}
        flags = ("the command line", {"data": given})
        run = None if asked.images else config_of(Path(path), flags)  # a run's own images, treated as it did
        skip = (run or build(flags)).data.on_bad_image == "skip"
        pictures = _pictures(asked.images, run).subsample(asked.limit)
    loading = LoaderConfig(
        asked.batch_size,
        0,
        asked.workers,
        device,
        Preprocessing.for_model(loaded.model),
        rank=ranks.rank,
        processes=ranks.world_size,
        bad=BadImages(skip=skip),
    )
    return Subject(loaded, pictures, loading)


def placed(model: "nn.Module", device: "torch.device", where: str) -> "nn.Module":
    """Move a model to the device; UserError where it does not fit."""
    try:
        return model.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        tip = "choose another --device, or end what else runs on it"
        raise UserError(f"the model does not fit in the memory of {device}", where, tip) from error


def _pictures(images: list[str], run: Config | None) -> Pictures:
    """Return what to look at: what the user names, the run's own held-out images, or two photographs."""
    if images:
        return named(images)
    return sample_photographs() if run is None else held_out(run)


def _images(subject: Subject, console: "RunConsole", what: str) -> "Iterator[Tensor]":
    """Yield this process's batches, and show how far they are."""
    batches: Iterable[Batch] = shared_batches(subject.pictures.split, subject.loading)
    total = -(-len(subject.pictures.split) // subject.loading.processes)
    return (batch.images for batch in with_progress(batches, total, console, what))


def _with_random(
    analysis: Analysis, subject: Subject, asked: Asked, console: "RunConsole", ranks: "Ranks", stop: "StopRequest"
) -> Analysis:
    """Measure P of the same model with random weights on some of the same images, or note why that could not be."""
    loaded, until, why = subject.loaded, Until(stop), ""
    few = replace(subject, pictures=subject.pictures.subsample(REFERENCE))
    try:
        with ranks.failing_together():
            model = placed(loaded.with_random_weights(), subject.loading.device, loaded.architecture)
        images = until(_images(few, console, "random weights"))
        random = measure(model, images, "similarity", loaded.name, asked.pairs, ranks)
    except UserError as error:
        why = f"random weights were not measured: {error.what}"
    if any(ranks.all_gather(until.cut)):
        why = "stopped before random weights were measured"
    return replace(analysis, notes=[*analysis.notes, why]) if why else with_random(analysis, random)


def _between(
    first: Measured, subject: Subject, asked: Asked, console: "RunConsole", ranks: "Ranks", stop: "StopRequest"
) -> tuple["pd.DataFrame | None", str]:
    """Return the CKA between the layers of the first checkpoint and those of this one, or why not, and a note."""
    both, until = f"cka between {first.name} and {subject.loaded.name}", Until(stop)
    if not _same(first.pictures, subject.pictures):
        return None, f"{both} was left out: they were measured on different images"
    try:
        other = prepare(first.path, asked, ranks)  # once more, beside this one
        pairs = zip(_images(other, console, both), _images(subject, console, both), strict=True)
        ours, theirs = tee(until(pairs))
        table = cka_between(
            other.loaded.model, subject.loaded.model, (one for one, _ in ours), (two for _, two in theirs), ranks
        )
    except UserError as error:
        stopped = any(ranks.all_gather(until.cut))
        return None, f"{both} was left out: {'stopped before' if stopped else error.what}"
    if any(ranks.all_gather(until.cut)):
        return None, f"{both} was left out: stopped before"
    return table, f"{both} is in analysis/cka_between.npz of {first.name}"


def _same(first: Pictures, second: Pictures) -> bool:
    """Tell whether two checkpoints were measured on the same images."""
    one, two = first.split, second.split
    if isinstance(one, ArraySplit) or isinstance(two, ArraySplit):
        return isinstance(one, ArraySplit) and isinstance(two, ArraySplit) and one.images.equal(two.images)
    same = len(one) == len(two) and first.description == second.description
    return same and all(one.name(index) == two.name(index) for index in range(len(one)))


def _described(subject: Subject, bad: int) -> str:
    """Say which images, how they were fitted to the model, and how many were left out."""
    side, split = subject.loading.preprocessing.size, subject.pictures.split
    squashed = isinstance(split, ArraySplit) or subject.loading.preprocessing.crop_mode == "squash"
    how = "RGB, resized" if squashed else "RGB, short side scaled, centre crop"
    left_out = f"; {bad} left out that do not decode" if bad else ""
    return f"{subject.pictures.description}; {how} to {side}x{side} px{left_out}"
