"""The measurements of `pdvit analyze`: each checkpoint, its model with random weights, and CKA with the first one."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.analysis import Analysis, cka_between, describe, measure
from pdvit.analysis.measure import select_metrics
from pdvit.cli.checkpoint import OpenedCheckpoint, open_checkpoint, to_device
from pdvit.cli.console import with_progress
from pdvit.data.image_sets import ImageSet, held_out_images, open_images, sample_photographs
from pdvit.data.loader import LoaderConfig, shared_batches
from pdvit.data.sources.split import ArraySplit
from pdvit.engine.device import device_name
from pdvit.engine.distributed import Ranks, init_process_group
from pdvit.engine.terminal import RunConsole, StopRequest
from pdvit.errors import UserError
from pdvit.models.layers import places_of
from pdvit.models.loading import LoadedModel

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# Images for a model with random weights.
RANDOM_IMAGES = 32


@dataclass(frozen=True)
class AnalyzeTarget:
    """A model on its device, and the images to measure."""

    loaded: LoadedModel
    loader: LoaderConfig
    images: ImageSet


@dataclass(frozen=True)
class CheckpointAnalysis:
    """The result for one checkpoint."""

    path: str
    name: str
    images: ImageSet
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
            analysis = measure(loaded.model, self._batches(target, loaded.name), groups, loaded.name, self.ranks)
        except UserError:
            if self.stopped():
                return None
            raise
        total = len(target.images.split)
        stopped = f"on request, after {analysis.images} of {total} images" if self.stopped() else None
        if not stopped and "similarity" in groups:
            analysis = self._with_random(analysis, target)
        if first is not None and "cka" in groups:
            between, note = self._cka_between(first, target)
            analysis = replace(analysis, notes=[*analysis.notes, note])
        bad = {name for names in self.ranks.all_gather(set(target.loader.bad.found)) for name in names}
        facts = describe(
            analysis,
            checkpoint=path,
            architecture=loaded.architecture,
            weights=loaded.weights,
            images=_describe_images(target, len(bad)),
            prefix=max(place.prefix for place in places_of(loaded.model).values()),
            device=device_name(target.loader.device),
            stopped=stopped,
        )
        return CheckpointAnalysis(path, loaded.name, target.images, analysis, facts, between)

    def stopped(self) -> bool:
        """Return whether a stop was requested on any rank."""
        return any(self.ranks.all_gather(bool(self.stop)))

    def open(self, path: str, ranks: Ranks) -> OpenedCheckpoint:
        """Load a checkpoint to the device; raises UserError."""
        on_bad_image = self.on_bad_image or ("error" if self.images else None)  # the run's policy is for its own images
        flags = {"data_batch_size": self.batch_size, "data_workers": self.workers, "data_on_bad_image": on_bad_image}
        return open_checkpoint(
            Path(path), ranks, self.model, self.weights, backbone=True, run_device=self.device, **flags
        )

    def _open(self, path: str) -> AnalyzeTarget:
        """Load a checkpoint and select its images; an error of one rank is raised on all."""
        with self.ranks.raise_on_all_ranks():
            opened = self.open(path, self.ranks)
            if self.images:
                images = open_images(self.images)
            else:  # the run's own images, read as the run did
                images = held_out_images(opened.config) if opened.is_run else sample_photographs()
        assert isinstance(opened.loaded, LoadedModel)
        return AnalyzeTarget(opened.loaded, opened.loader, images.subsample(self.limit))

    def _batches(self, target: AnalyzeTarget, label: str) -> "Iterator[Tensor]":
        """Yield this rank's batches until a stop is requested, with a progress bar."""
        batches = shared_batches(target.images.split, target.loader)
        total = -(-len(target.images.split) // target.loader.processes)
        shown = with_progress(batches, total, self.console, label)
        return (batch.images for batch in takewhile(lambda _: not self.stop, shown))

    def _with_random(self, analysis: Analysis, target: AnalyzeTarget) -> Analysis:
        """Add P of the same model with random weights on some of the same images, or a note why it is missing."""
        loaded, reason = target.loaded, ""
        few = replace(target, images=target.images.subsample(RANDOM_IMAGES))
        try:
            with self.ranks.raise_on_all_ranks():
                model = to_device(loaded.with_random_weights(), target.loader.device, loaded.architecture)
            random = measure(model, self._batches(few, "random weights"), "similarity", ranks=self.ranks)
        except UserError as error:
            reason = f"random weights were not measured: {error.what}"
        if self.stopped():
            reason = "stopped before random weights were measured"
        return replace(analysis, notes=[*analysis.notes, reason]) if reason else analysis.with_random(random)

    def _cka_between(self, first: CheckpointAnalysis, target: AnalyzeTarget) -> "tuple[pd.DataFrame | None, str]":
        """Return the CKA between the layers of the first checkpoint and those of this one, or None; and a note."""
        label, table, reason = f"cka between {first.name} and {target.loaded.name}", None, ""
        if not _same_images(first.images, target.images):
            return None, f"{label} was left out: they were measured on different images"
        try:
            other = self._open(first.path)  # once more, beside this one
            images, other_images = self._batches(other, label), self._batches(target, label)
            table = cka_between(other.loaded.model, target.loaded.model, images, other_images, self.ranks)
        except UserError as error:
            reason = error.what
        if self.stopped():
            reason = "stopped before"
        if reason:
            return None, f"{label} was left out: {reason}"
        return table, f"{label} is in analysis/cka_between.npz of {first.name}"


def _same_images(first: ImageSet, second: ImageSet) -> bool:
    one, two = first.split, second.split
    if isinstance(one, ArraySplit) or isinstance(two, ArraySplit):
        return isinstance(one, ArraySplit) and isinstance(two, ArraySplit) and one.images.equal(two.images)
    same = len(one) == len(two) and first.description == second.description
    return same and all(one.name(index) == two.name(index) for index in range(len(one)))


def _describe_images(target: AnalyzeTarget, bad: int) -> str:
    preprocessing, images = target.loader.preprocessing, target.images
    squashed = isinstance(images.split, ArraySplit) or preprocessing.crop_mode == "squash"
    resized = "RGB, resized" if squashed else "RGB, short side scaled, centre crop"
    left_out = f"; {bad} left out that do not decode" if bad else ""
    return f"{images.description}; {resized} to {preprocessing.size}x{preprocessing.size} px{left_out}"
