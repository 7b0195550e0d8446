"""The measurements of `pdvit analyze`: each checkpoint, its model with random weights, and CKA with the first one."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.analysis import Analysis, cka_between, describe, measure
from pdvit.analysis.measure import select_metrics
from pdvit.cli.checkpoint import config_of
from pdvit.cli.console import with_progress
from pdvit.config import build
from pdvit.data.image_sets import ImageSet, held_out_images, open_images, sample_photographs
from pdvit.data.images import BadImages
from pdvit.data.loader import LoaderConfig, shared_batches
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import ArraySplit
from pdvit.engine.device import choose_device, device_name, is_out_of_memory
from pdvit.engine.distributed import Ranks, init_process_group
from pdvit.engine.terminal import RunConsole, StopRequest
from pdvit.errors import UserError
from pdvit.models.layers import places_of
from pdvit.models.loading import LoadedModel, load_model
from pdvit.models.resolved_checkpoint import resolve_checkpoint

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

# Images for a model with random weights.
RANDOM_IMAGES = 32


@dataclass(frozen=True)
class AnalyzeTarget:
    """A checkpoint on its device, and its images."""

    loaded: LoadedModel
    pictures: ImageSet
    loader_config: LoaderConfig


@dataclass(frozen=True)
class CheckpointAnalysis:
    """The result for one checkpoint."""

    path: str
    name: str
    pictures: ImageSet
    analysis: Analysis
    facts: dict[str, Any]  # the content of analysis.json
    between: "pd.DataFrame | None" = None  # CKA between the layers of the first checkpoint and its own


@dataclass
class Analyzer:
    """Measures checkpoints one after the other with the same options, each on all ranks, until a stop is requested."""

    console: RunConsole
    images: list[str]
    metrics: list[str]
    limit: int = 256
    model: str | None = None
    weights: str | None = None
    batch_size: int = 32
    workers: int = 2
    device: str = "auto"
    on_bad_image: str | None = None
    ranks: Ranks = field(default_factory=init_process_group)
    stop: StopRequest = field(default_factory=StopRequest)

    def measure(self, path: str, first: CheckpointAnalysis | None) -> CheckpointAnalysis | None:
        """Load and measure a checkpoint, and compare it with the first; None if stopped before its first image."""
        groups = select_metrics(self.metrics)  # an error for an unknown name, before anything is loaded
        target = self._open(path)
        loaded, between = target.loaded, None
        try:
            analysis = measure(loaded.model, self._images(target, loaded.name), groups, loaded.name, self.ranks)
        except UserError:
            if self.stopped():
                return None
            raise
        total = len(target.pictures.split)
        stopped = f"on request, after {analysis.images} of {total} images" if self.stopped() else None
        if not stopped and "similarity" in groups:
            analysis = self._with_random(analysis, target)
        if first is not None and "cka" in groups:
            between, note = self._cka_between(first, target)
            analysis = replace(analysis, notes=[*analysis.notes, note])
        bad = {name for names in self.ranks.all_gather(set(target.loader_config.bad.found)) for name in names}
        facts = describe(
            analysis,
            checkpoint=path,
            architecture=loaded.architecture,
            weights=loaded.weights,
            images=_describe_images(target, len(bad)),
            prefix=max(place.prefix for place in places_of(loaded.model).values()),
            device=device_name(target.loader_config.device),
            stopped=stopped,
        )
        return CheckpointAnalysis(path, loaded.name, target.pictures, analysis, facts, between)

    def stopped(self) -> bool:
        """Return whether a stop was requested on any rank."""
        return any(self.ranks.all_gather(bool(self.stop)))

    def _open(self, path: str) -> AnalyzeTarget:
        """Load a checkpoint to the device and select its images; an error of one rank is raised on all."""
        ranks = self.ranks
        with ranks.raise_on_all_ranks():
            loaded = load_model(resolve_checkpoint(path, self.model, self.weights))
            device = choose_device(self.device, ranks.local_rank if ranks.world_size > 1 else None)
            to_device(loaded.model, device, path)
            settings = {"on_bad_image": self.on_bad_image} if self.on_bad_image is not None else {}
            flags = ("the command line", {"data": settings})
            if self.images:
                run, pictures = None, open_images(self.images)
            else:  # the run's own images, read as the run did
                run = config_of(Path(path), flags)
                pictures = sample_photographs() if run is None else held_out_images(run)
            bad = BadImages(skip=(run or build(flags)).data.on_bad_image == "skip")
        config = LoaderConfig(self.batch_size, 0, self.workers, device, Preprocessing.for_model(loaded.model), bad=bad)
        config = replace(config, rank=ranks.rank, processes=ranks.world_size)
        return AnalyzeTarget(loaded, pictures.subsample(self.limit), config)

    def _images(self, target: AnalyzeTarget, label: str) -> "Iterator[Tensor]":
        """Yield this rank's batches until a stop is requested, with a progress bar."""
        batches = shared_batches(target.pictures.split, target.loader_config)
        total = -(-len(target.pictures.split) // target.loader_config.processes)
        shown = with_progress(batches, total, self.console, label)
        return (batch.images for batch in takewhile(lambda _: not self.stop, shown))

    def _with_random(self, analysis: Analysis, target: AnalyzeTarget) -> Analysis:
        """Add P of the same model with random weights on some of the same images, or a note why it is missing."""
        loaded, why = target.loaded, ""
        few = replace(target, pictures=target.pictures.subsample(RANDOM_IMAGES))
        try:
            with self.ranks.raise_on_all_ranks():
                model = to_device(loaded.with_random_weights(), target.loader_config.device, loaded.architecture)
            random = measure(model, self._images(few, "random weights"), "similarity", ranks=self.ranks)
        except UserError as error:
            why = f"random weights were not measured: {error.what}"
        if self.stopped():
            why = "stopped before random weights were measured"
        return replace(analysis, notes=[*analysis.notes, why]) if why else analysis.with_random(random)

    def _cka_between(self, first: CheckpointAnalysis, target: AnalyzeTarget) -> "tuple[pd.DataFrame | None, str]":
        """Return the CKA between the layers of the first checkpoint and those of this one, or None; and a note."""
        label, table, why = f"cka between {first.name} and {target.loaded.name}", None, ""
        if not _same_images(first.pictures, target.pictures):
            return None, f"{label} was left out: they were measured on different images"
        try:
            other = self._open(first.path)  # once more, beside this one
            images, other_images = self._images(other, label), self._images(target, label)
            table = cka_between(other.loaded.model, target.loaded.model, images, other_images, self.ranks)
        except UserError as error:
            why = error.what
        if self.stopped():
            why = "stopped before"
        if why:
            return None, f"{label} was left out: {why}"
        return table, f"{label} is in analysis/cka_between.npz of {first.name}"


def to_device(model: "nn.Module", device: "torch.device", where: str) -> "nn.Module":
    """Move a model to the device; UserError if it does not fit."""
    try:
        return model.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        tip = "choose another --device, or end what else runs on it"
        raise UserError(f"the model does not fit in the memory of {device}", where, tip) from error


def _same_images(first: ImageSet, second: ImageSet) -> bool:
    one, two = first.split, second.split
    if isinstance(one, ArraySplit) or isinstance(two, ArraySplit):
        return isinstance(one, ArraySplit) and isinstance(two, ArraySplit) and one.images.equal(two.images)
    same = len(one) == len(two) and first.description == second.description
    return same and all(one.name(index) == two.name(index) for index in range(len(one)))


def _describe_images(target: AnalyzeTarget, bad: int) -> str:
    preprocessing, split = target.loader_config.preprocessing, target.pictures.split
    squashed = isinstance(split, ArraySplit) or preprocessing.crop_mode == "squash"
    resized = "RGB, resized" if squashed else "RGB, short side scaled, centre crop"
    left_out = f"; {bad} left out that do not decode" if bad else ""
    return f"{target.pictures.description}; {resized} to {preprocessing.size}x{preprocessing.size} px{left_out}"
