"""The base of tasks on images: construction, the probe, records and the closing numbers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from pdvit.config.duration import parse_duration, weight_schedule
from pdvit.config.schema import Config, DiversityConfig
from pdvit.data.images import BadImages, describe_bad
from pdvit.data.loader import Batch, LoaderConfig, eval_batches, steps_per_epoch
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.randomness import fold
from pdvit.data.sources.split import Source, subsample
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError
from pdvit.losses import TERMS, Objective
from pdvit.losses.terms import WeightSchedule
from pdvit.models.build import strides_of
from pdvit.models.layers import exact_float32, find_layers, watch
from pdvit.models.wrapper import BACKBONE, Wrapper, freeze
from pdvit.similarity import patch_similarity
from pdvit.tasks import describe_metrics
from pdvit.tasks.metrics import Metric, evaluate
from pdvit.tasks.windows import Network

BARS = "▁▂▃▄▅▆▇█"


class ImageTask(ABC):
    """A task on batches of images; a subclass completes `pdvit.engine.protocol.Task`."""

    name: str
    best_metric: str
    recorded: tuple[str, ...]  # names of the metrics in records and summary
    module: Wrapper
    class_loss: Any = None  # of logits and targets; None: cross-entropy with label smoothing

    def __init__(self, config: Config, source: Source, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.config, self.source, self.device, self.ranks = config, source, device, ranks
        torch.manual_seed(config.run.seed)
        weights: dict[str, Any] = {term: getattr(config.diversity, term) or 0.0 for term in TERMS}
        weights |= {"variant": config.diversity.variant or "paper", "gram_variant": config.diversity.gram_variant}
        smoothing = config.augment.smoothing
        self.objective = Objective(**weights, label_smoothing=smoothing, class_loss=self.class_loss)
        self.module = self.build_module().to(device)
        if config.model.freeze is not None:
            freeze(self.module, config.model.freeze)
            terms = ", ".join(term for term in TERMS if weights[term] and term != "mixing")
            if config.model.freeze == BACKBONE and terms:
                what = f"with a frozen backbone the tokens never change, so these terms do nothing: {terms}"
                tip = "use --diversity none; of the terms only --mixing trains a head"
                raise UserError(what, "model.freeze (--freeze)", tip)
        # Made again once initial weights are loaded.
        self.anchor = self.module.make_anchor() if self.objective.gram else None
        self.patch_size = strides_of(self.module.inside)[-1]
        self.preprocessing = Preprocessing.for_model(self.module.inside, config.data)
        self.batch_size = batch_size = config.data.batch_size
        if batch_size % ranks.world_size:
            what = f"a batch of {batch_size} can't be divided evenly among {ranks.world_size} processes"
            raise UserError(what, "data.batch_size (--batch-size)", f"choose a multiple of {ranks.world_size}")
        self.steps_per_epoch = per_epoch = steps_per_epoch(source.splits["train"], batch_size)
        total = parse_duration(config.optim.epochs, "ep", "optim.epochs").steps(per_epoch, batch_size)
        lengths = [weight_schedule(config.diversity, term).items() for term in TERMS]
        parts = [{name: length.steps(per_epoch, batch_size, total) for name, length in items} for items in lengths]
        self.schedules = [WeightSchedule(total, **steps) for steps in parts]
        self.scheduled = any(parts)
        self.bad = BadImages(skip=config.data.on_bad_image == "skip")
        self.logged_bad: set[str] = set()
        data, seed, size = config.data, config.run.seed, ranks.world_size
        workers = config.launch.cpus if data.workers is None else data.workers
        self.loader = LoaderConfig(
            batch_size, seed, workers, device, self.preprocessing, data.micro_batch, ranks.rank, size, self.bad
        )
        self.fingerprint = source.fingerprint()
        if ranks.rank:  # the weights are the same on all ranks, the draws of drop path are not
            torch.manual_seed(fold(seed, ranks.rank))

    @abstractmethod
    def build_module(self) -> Any:
        """Return the module to train."""

    @abstractmethod
    def evaluation(self, network: nn.Module, split: str) -> tuple[Network, Iterator[Batch], Metric, int]:
        """Return logits as a function of images, this rank's part of a split, its metric, and the side of a pass."""

    def step_output(self, loss: Tensor, parts: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss with its parts as detached metrics, and the number of replaced images."""
        metrics = {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}
        if batch.replaced is not None:  # metrics are means over the images; times the images it is the number of a step
            metrics["bad_images"] = batch.replaced.float().mean() * self.batch_size
        return loss, metrics

    def evaluate(self, network: nn.Module) -> tuple[Mapping[str, Mapping[str, Any]], str]:
        """Measure the validation split, and P of every layer on the probe."""
        numbers = self._measure(network, "val")
        found: dict[str, Tensor] = {}
        model: Any = network.inside
        places = find_layers(model)[1]
        measured = watch(places, lambda name, tokens: found.update({name: patch_similarity(tokens).mean()}))
        with torch.no_grad(), exact_float32(self.device), measured:
            network(self.probe)
        names, values = [*found], torch.stack([*found.values()]).tolist()
        bars = "".join(BARS[min(7, int(value * 8))] if value >= 0 else "?" for value in values)
        metrics = describe_metrics(numbers, len("97.2%"))
        text = f"val {metrics}  P {names[0]} {values[0]:.2f} {bars} {names[-1]} {values[-1]:.2f}"
        if broken := [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]:
            text += f"\nwarning: tokens of {', '.join(broken)} are not finite, so P is undefined. "
            text += "Start a new run with a lower --lr, or with --clip-grad 1"
        if values[-1] > self.config.run.warn_similarity:
            cosine = "a larger --cosine" if self.config.diversity.cosine else "--cosine 1"
            text += f"\nwarning: P of {names[-1]} is {values[-1]:.2f}: the patches are collapsing. Try {cosine}, "
            text += "a lower --lr or a longer --warmup-epochs (--warn-similarity sets the threshold)"
        if "skipped" in numbers:
            text += f"\nskipped, as they do not decode: {numbers['skipped']}"
        similarity = {"images": len(self.probe), "layers": names, "similarity": values}
        return {"eval": numbers, "similarity": similarity}, text

    def finish(self, network: nn.Module, weights: str) -> dict[str, Any]:
        """Measure the final split, and P of first and last on the probe."""
        numbers = self._measure(network, self.source.final_split)
        with torch.no_grad(), exact_float32(self.device):
            output = network(self.probe)
        first, last = (float(patch_similarity(tokens).mean()) for tokens in (output.first, output.last))
        return {"task": self.name, **numbers, "similarity_first": first, "similarity_last": last, "weights": weights}

    @cached_property
    def probe(self) -> Tensor:
        """Held-out images on which P is measured, all of them on every rank; loaded on first use, when data are."""
        chosen = subsample(self.source.splits["val"], self.config.run.probe_images)
        batches = [batch.images for batch in eval_batches(chosen, replace(self.loader, rank=0, processes=1))]
        if not batches:
            raise UserError("none of the probe's images decodes", "run.probe_images", "raise it, or replace them")
        return torch.cat(batches)

    def _measure(self, network: nn.Module, split: str) -> dict[str, Any]:
        """Return the metrics of a split, how many of its images were skipped, and the names of those that are new."""
        run, (logits, batches, metric, side) = self.config.run, self.evaluation(network.eval(), split)
        sharded_side = side if run.distribute == "fsdp" else None
        self.scores = scores = evaluate(logits, batches, metric, run.precision, self.ranks, sharded_side)
        numbers = {"split": split} | {name: value for name, value in scores.numbers.items() if name in self.recorded}
        if not self.bad.skip:
            return numbers
        found = {name: reason for part in self.ranks.all_gather(self.bad.found) for name, reason in part.items()}
        new = {name: reason for name, reason in found.items() if name not in self.logged_bad}
        self.logged_bad |= set(new)
        numbers["bad_images"] = len(self.source.splits[split]) - scores.images
        return numbers | ({"skipped": describe_bad(new)} if new else {})


def with_weights(batches: Generator[Batch], schedules: Sequence[WeightSchedule], start: int) -> Generator[Batch]:
    """Give the batches of steps start, start + 1, ... the factors of the terms' weights.

    A number would be compiled into the step, so it is a tensor; filled on the device, so nothing waits for a copy.
    """
    with closing(batches):
        for step, batch in zip(count(start), batches, strict=False):
            images, device = len(batch), batch.images.device
            columns = [torch.full((images,), schedule(step), device=device) for schedule in schedules]
            yield replace(batch, weights=torch.stack(columns, 1))


def describe_terms(diversity: DiversityConfig) -> str:
    """Return the active terms with their weights, variant and schedules."""
    weights = {term: getattr(diversity, term) for term in TERMS if getattr(diversity, term)}
    terms = ", ".join(f"{term} {weight:g}" for term, weight in weights.items()) or "none"
    variant = f" ({diversity.variant})" if diversity.variant != "paper" and weights else ""
    schedules = {term: getattr(diversity, f"{term}_schedule") for term in weights}
    scheduled = (f", {term} {schedule}" for term, schedule in schedules.items() if schedule != "constant")
    return terms + variant + "".join(scheduled)
