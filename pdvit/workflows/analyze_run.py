"""The measurements and pages of `pdvit analyze`: each checkpoint, its model with random weights, CKA with the first."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pdvit.analysis import Analysis, cka_between, measure
from pdvit.analysis.measure import BATCH_SIZE, Images, select_metrics
from pdvit.analysis.verdict import verdict
from pdvit.config.recipes import merge_layers
from pdvit.data.images import BadImages
from pdvit.data.loader import eval_batches
from pdvit.data.opening import ImageSet, open_images
from pdvit.data.sources.split import ArraySplit
from pdvit.definitions import DEFINITIONS, LIMIT
from pdvit.engine.device import device_name
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks, init_process_group
from pdvit.engine.terminal import RunConsole, Stopped
from pdvit.errors import UserError, command
from pdvit.models.layers import find_layers
from pdvit.models.resolved_checkpoint import ResolvedCheckpoint
from pdvit.tracking.run_directory import write_file, writing
from pdvit.workflows.checkpoint import OpenedCheckpoint, open_checkpoint, to_device
from pdvit.workflows.console import count, log, with_progress

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

T = TypeVar("T")
RANDOM_IMAGES = 32  # for a model with random weights


@dataclass(frozen=True)
class CheckpointAnalysis:
    """The result for one checkpoint."""

    path: str
    folder: Path  # of the results
    name: str
    images: ImageSet
    analysis: Analysis
    facts: dict[str, Any]  # the content of analysis.json
    between: "pd.DataFrame | None" = None  # CKA between the layers of the first checkpoint and its own


class Analyzer:
    """Measures checkpoints in turn, each on all ranks, until a stop; `opening` are arguments of `open_checkpoint`."""

    def __init__(
        self, console: RunConsole, images: list[str], metrics: Sequence[str], limit: int, **opening: Any
    ) -> None:
        self.console, self.images, self.metrics, self.limit = console, images, metrics, limit
        if images:  # the run's policy is for its own images
            opening["given"] = merge_layers([{"data": {"on_bad_image": "error"}}, opening["given"]])
        self.opening, self.ranks = opening, init_process_group()

    def measure(self, path: str, folder: Path, first: CheckpointAnalysis | None) -> CheckpointAnalysis | None:
        """Load and measure a checkpoint, and compare it with the first; None if stopped before its first image."""
        groups = select_metrics(self.metrics)  # an error for an unknown name, before anything is loaded
        try:
            opened, images = self._open(path)
            name, between = opened.loaded.name, None
            analysis = measure(opened.loaded.model, self._batches(opened, images, name), groups, name, self.ranks)
        except (UserError, Stopped):
            if self.stopped():
                return None
            raise
        stopped = f"on request, after {analysis.images} of {len(images.split)} images" if self.stopped() else None
        if not stopped and "similarity" in groups:
            batches = self._batches(opened, images.subsample(RANDOM_IMAGES), "random weights")
            random, reason = self._attempt(lambda: measure_random(opened.loaded, batches, self.ranks))
            note = f"random weights were not measured: {reason}"
            analysis = analysis.with_random(random) if random else replace(analysis, notes=[*analysis.notes, note])
        if first is not None and "cka" in groups:
            between, reason = self._attempt(lambda: self._cka_between(first, opened, images))
            found = f"was left out: {reason}" if reason else f"is in analysis/cka_between.npz of {first.name}"
            analysis = replace(analysis, notes=[*analysis.notes, f"cka between {first.name} and {name} {found}"])
        bad = {name for names in self.ranks.all_gather(set(opened.loader.bad.found)) for name in names}
        left_out = [f"{count(len(bad), 'image')} left out that can't be decoded"] if bad else []
        analysis = replace(analysis, notes=[*left_out, *analysis.notes])
        facts = describe(analysis, opened, images, stopped, self._again(opened)) | {"groups": groups}
        return CheckpointAnalysis(path, folder, name, images, analysis, facts, between)

    def stopped(self) -> bool:
        """Return whether a stop was requested on any rank."""
        return any(self.ranks.all_gather(bool(self.ranks.stop)))

    def _open(self, path: str) -> tuple[OpenedCheckpoint, ImageSet]:
        """Load a checkpoint and select its images; an error of one rank is raised on all, and Stopped."""
        with self.ranks.interruptible():
            opened = open_checkpoint(Path(path), self.ranks, backbone=True, **self.opening)
            images = open_images(self.images) if self.images else opened.images
        return opened, images.subsample(self.limit)

    def _again(self, opened: OpenedCheckpoint) -> list[str]:
        """Return the arguments of pdvit analyze that measure a checkpoint on these images again."""
        words = [str(opened.path), *opened.options, *(word for name in self.images for word in ("--images", name))]
        words += ["--limit", str(self.limit)] if self.limit != LIMIT else []
        words += ["--batch-size", str(size)] if (size := opened.loader.batch_size) != BATCH_SIZE else []  # for cka
        skips = self.images and opened.config.data.on_bad_image == "skip"
        return [*words, *(["--on-bad-image", "skip"] if skips else [])]

    def _batches(self, opened: OpenedCheckpoint, images: ImageSet, label: str) -> "Iterator[Tensor]":
        """Yield this rank's batches until a stop is requested, with a progress bar."""
        batches = eval_batches(images.split, opened.loader, shared=True)
        shown = with_progress(batches, -(-len(images.split) // self.ranks.world_size), self.console, label)
        return (batch.images for batch in self.ranks.stop.until(shown))

    def _attempt(self, compute: Callable[[], T]) -> tuple[T | None, str]:
        """Return the result of an additional measurement, or None and the reason."""
        try:
            result, reason = compute(), ""
        except (UserError, Stopped) as error:
            result, reason = None, getattr(error, "what", "")
        return (None, "it was stopped before") if self.stopped() else (result, reason)

    def _cka_between(self, first: CheckpointAnalysis, opened: OpenedCheckpoint, images: ImageSet) -> "pd.DataFrame":
        """Return the CKA between the layers of the first checkpoint and those of this one; raises UserError."""
        one, two = ((it.description, it.split.hash()) for it in (first.images, images))
        if one != two:
            raise UserError("they were measured on different images", first.path, "name the images: --images")
        other, other_images = self._open(first.path)  # once more, beside this one
        batches = self._batches(other, other_images, "cka"), self._batches(opened, images, "cka")
        return cka_between(other.loaded.model, opened.loaded.model, *batches, self.ranks)


def measure_random(
    checkpoint: ResolvedCheckpoint, images: Images, ranks: Ranks = SINGLE_PROCESS, **layout: Any
) -> Analysis:
    """Return P of a checkpoint's model with random weights; arguments as of `measure`."""
    with ranks.interruptible():
        model = random_model(checkpoint)
    return measure(model, images, "similarity", ranks=ranks, **layout)


def random_model(checkpoint: ResolvedCheckpoint) -> "nn.Module":
    """Return a checkpoint's model with random weights, on its device and in its precision."""
    weight = next(checkpoint.model.parameters())
    model = checkpoint.with_random_weights().to(weight.dtype)
    return to_device(model, weight.device, checkpoint.architecture)


def describe(
    analysis: Analysis, opened: OpenedCheckpoint, images: ImageSet, stopped: str | None, again: list[str]
) -> dict[str, Any]:
    """Return analysis.json: `stopped` is why the last images were missed, `again` the arguments of pdvit analyze."""
    table, loaded = analysis.table, opened.loaded
    has_p = bool((table["metric"] == "similarity").any())
    found, advice = verdict(table, command("analyze", *again), _command_to_reduce_p(opened)) if has_p else (None, None)
    preprocessing = opened.loader.preprocessing
    squashed = isinstance(images.split, ArraySplit) or preprocessing.crop_mode == "squash"
    resized = "RGB, resized" if squashed else "RGB, short side scaled, centre crop"
    last = "the final norm" if analysis.layers[-1] == "norm" else "the last block (no final norm over patches)"
    stages = "; grid and width change between stages" if table["tokens"].nunique() > 1 else ""
    notes = [*loaded.notes, *analysis.notes, *([] if has_p else ["no verdict, which needs P: --metrics similarity"])]
    return {
        "model": loaded.name,
        "checkpoint": str(opened.path),
        "arguments": [os.path.abspath(word) if os.path.exists(word) else word for word in again],
        "weights": loaded.selected.weights,
        "images": f"{images.description}; {resized} to {preprocessing.size}x{preprocessing.size} px",
        "images_measured": analysis.images,
        "patch_tokens": int(table["tokens"].iloc[-1]),
        "prefix_tokens_dropped": max(place.prefix for place in find_layers(loaded.model)[1].values()),
        "layers": "embed is the input of block 1 (with position); blocks are read before the final norm; the last row "
        f"is {last}{stages}",
        "metrics": {name: DEFINITIONS[name].text for name in dict.fromkeys(table["metric"])},
        "notes": notes,
        "stopped": stopped,
        "spread": "std and ci95 (half-width, Student's t) over images",
        "input": opened.origins,
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "device": device_name(opened.loader.device),
        "verdict": found,
        "advice": advice,
    }


def _command_to_reduce_p(opened: OpenedCheckpoint) -> str:
    """Return the command that reduces P: trains a run again with another setting, or finetunes a checkpoint."""
    if not opened.is_run:
        trained = "finetune" if opened.loaded.adapter is None else "segment"
        return command(trained, str(opened.path), *opened.options, "--data", "FOLDER", "--cosine", "1")
    terms = opened.config.diversity
    variant = ["--variant", "paper"] if terms.variant == "released" else []  # it has no cosine term
    again = ("train", "--config", str(opened.path / "run.toml"))
    return command(*again, "--cosine", f"{2 * (terms.cosine or 0.5):g}", *variant)


def write_explorer(results: Sequence[CheckpointAnalysis], analyzer: Analyzer) -> None:
    """Write explorer.html for the first folder and maps.npz for each, of the same images; checkpoints load again."""
    from pdvit.analysis.explorer import MAX_IMAGES, bytes_per_model, read_maps, write_maps
    from pdvit.analysis.pages import explorer_page
    from pdvit.analysis.tables import MAPS

    images, bad, models = results[0].images, BadImages(skip=True), []
    shown, max_bytes = images.subsample(MAX_IMAGES), bytes_per_model(len(results))
    for result in results:
        opened = open_checkpoint(Path(result.path), SINGLE_PROCESS, backbone=True, **analyzer.opening)
        pixels, normalise = [*shown.pixels(opened.loader.preprocessing, bad)], opened.loader.preprocessing.normalise
        maps = read_maps(opened.loaded.model, pixels, normalise, result.name, max_bytes)
        if not result.analysis.random.empty:
            random = read_maps(random_model(opened.loaded), pixels, normalise, max_bytes=max_bytes)
            maps = replace(maps, random=random.similarity)
        models.append(maps)
    explored, left_out = min(len(maps.names) for maps in models), len(bad.found)
    fewer = "; more would make the page larger than 10 MB" if explored < len(shown.split) - left_out else ""
    broken = f"; {left_out} left out that do not decode" if left_out else ""
    notes = [f"images: {explored} of {len(images.split):,}, spread evenly ({images.description}){fewer}{broken}"]
    page = results[0].folder / "explorer.html"
    with writing("the page", page):
        for result, maps in zip(results, models, strict=True):
            write_maps(result.folder / "analysis" / MAPS, maps)
        write_file(page, explorer_page(models, notes))
    for note in [*notes, *(f"{maps.model}: {note}" for maps in models for note in maps.notes)]:
        log(analyzer.console, f"explorer {note}")
    log(analyzer.console, f"written  {page}")
