"""What all tasks on images have in common: who shares what, the probe, the order of the closing numbers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pdvit.config.schema import Config, DiversityConfig
from pdvit.data.bad_images import BadImages, describe_bad
from pdvit.data.batch import Batch
from pdvit.data.loader import LoaderConfig, steps_per_epoch
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.randomness import fold
from pdvit.data.sources import Source
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.engine.protocol import StepOutput
from pdvit.errors import UserError
from pdvit.losses import TERMS, Objective
from pdvit.models.freezing import BACKBONE
from pdvit.tasks.probe import Probe, describe_similarity
from pdvit.tasks.weights import weight_schedules, with_weights


class ImageTask(ABC):
    """A task on batches of images, but for what is built and how it is measured; see `pdvit.engine.protocol.Task`.

    A task calls this first, builds its module, and then says what its images look like (`use`).
    """

    name: str
    best_metric: str
    module: nn.Module

    def __init__(self, config: Config, source: Source, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.config, self.source, self.device, self.ranks = config, source, device, ranks
        torch.manual_seed(config.run.seed)
        self._probe: Probe | None = None

    def use(self, preprocessing: Preprocessing) -> None:
        """Settle how batches are made and shared; raises UserError where processes can't share them evenly."""
        config, ranks = self.config, self.ranks
        self.preprocessing, self.batch_size = preprocessing, config.data.batch_size
        if self.batch_size % ranks.world_size:
            raise UserError(
                f"{ranks.world_size} processes can't share batches of {self.batch_size} evenly",
                "data.batch_size (--batch-size)",
                f"choose a multiple of {ranks.world_size}",
            )
        self.steps_per_epoch = steps_per_epoch(self.source.splits["train"], self.batch_size)
        self.schedules = weight_schedules(config, self.steps_per_epoch, self.batch_size)
        self.bad = BadImages(skip=config.data.on_bad_image == "skip")
        self.named: set[str] = set()  # of the bad images, those that were shown
        self.loading = LoaderConfig(
            self.batch_size,
            config.run.seed,
            config.data.workers,
            self.device,
            preprocessing,
            config.data.micro_batch,
            ranks.rank,
            ranks.world_size,
            self.bad,
        )
        self.fingerprint = self.source.fingerprint()
        if ranks.rank:  # the weights are the same on all processes; what drop path draws is not
            torch.manual_seed(fold(config.run.seed, ranks.rank))

    @staticmethod
    @abstractmethod
    def open_source(config: Config, log: Callable[[str], None]) -> Source:
        """Open the data of a configuration; raises UserError."""

    @classmethod
    def resolve(cls, config: Config, world_size: int, device: torch.device) -> Config:
        """Fill in what depends on the number of processes and their device; raises UserError."""
        return config

    @abstractmethod
    def describe(self) -> str:
        """Return one or two lines on the model, its images, the terms and the augmentation."""

    @abstractmethod
    def measure(self, network: nn.Module, split: str) -> tuple[dict[str, Any], int, str]:
        """Measure a split; every image counts exactly once, over all processes.

        Returns the numbers by name, how many images were measured, and the numbers in words.
        """

    @abstractmethod
    def training_batches(self, start: int) -> Generator[Batch, None, None]:
        """Yield training batches from step `start` on, without end."""

    @abstractmethod
    def load(self, log: Callable[[str], None]) -> None:
        """Move small data sets onto the device, and log it; raises UserError."""

    @abstractmethod
    def step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """Run forward pass and objective on one batch, in training mode."""

    @abstractmethod
    def export(self, state: Mapping[str, Tensor], weights: str) -> dict[str, bytes]:
        """Return the files that hold these weights of the module (name -> content)."""

    def batch_of(self, tensors: Mapping[str, Tensor]) -> Batch:
        """Return the batch that gave these tensors."""
        return Batch(**tensors)

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """Yield training batches from step `start` on, without end, with the weights of the terms that change."""
        batches = self.training_batches(start)
        if all(schedule.constant for schedule in self.schedules):
            return batches
        return with_weights(batches, self.schedules, start)

    def evaluate(self, network: nn.Module) -> tuple[Mapping[str, Mapping[str, Any]], str]:
        """Measure the validation split, and P of every layer on the probe."""
        numbers, images, words = self.measure(network, "val")
        names, values = self.probe.similarity(bare(network), network)
        records = {
            "eval": {"split": "val", **numbers, **self._left_out(images, "val")},
            "similarity": {"images": len(self.probe.images), "layers": names, "similarity": values},
        }
        line, warnings = describe_similarity(names, values, self.config.run.warn_similarity)
        skipped = self._newly_skipped()
        skipped = f"\nskipped, as they do not decode: {skipped}" if skipped else ""
        return records, f"val {words}  {line}{warnings}{skipped}"

    def finish(self, network: nn.Module, weights: str) -> dict[str, Any]:
        """Measure the final split, and P of first and last on the probe."""
        split = self.source.final_split
        numbers, images, _ = self.measure(network, split)
        first, last = self.first_last(network)
        skipped = self._newly_skipped()
        return {
            "task": self.name,
            "split": split,
            **numbers,
            **self._left_out(images, split),
            **({"skipped": skipped} if skipped else {}),
            "similarity_first": first,
            "similarity_last": last,
            "weights": weights,
        }

    @property
    def probe(self) -> Probe:
        """The probe, of the data where they are when it is first asked for."""
        if self._probe is None:
            alone = replace(self.loading, rank=0, processes=1)
            self._probe = Probe(self.source.splits["val"], self.config.run.probe_images, alone)
        return self._probe

    @abstractmethod
    def first_last(self, network: nn.Module) -> tuple[float, float]:
        """Return P of first and last on the probe."""

    def _left_out(self, images: int, split: str) -> dict[str, int]:
        """Say how many images a split lacks, where those that do not decode are skipped."""
        return {"bad_images": len(self.source.splits[split]) - images} if self.bad.skip else {}

    def _newly_skipped(self) -> str:
        """Name the images that were skipped and not named before; every process has met others."""
        found: dict[str, str] = {}
        for part in self.ranks.all_gather(self.bad.found) if self.bad.skip else []:
            found |= part
        new = {name: reason for name, reason in found.items() if name not in self.named}
        self.named |= set(new)
        return describe_bad(new)


def describe_terms(diversity: DiversityConfig) -> str:
    """Return the terms that are on, with their weights, variant and schedules."""
    weights = {term: getattr(diversity, term) for term in TERMS if getattr(diversity, term)}
    terms = ", ".join(f"{term} {weight:g}" for term, weight in weights.items()) or "none"
    variant = f" ({diversity.variant})" if diversity.variant != "paper" and weights else ""
    schedules = {term: getattr(diversity, f"{term}_schedule") for term in weights}
    scheduled = (f", {term} {schedule}" for term, schedule in schedules.items() if schedule != "constant")
    return terms + variant + "".join(scheduled)


def objective_of(config: Config, class_loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Objective:
    """Return the class loss plus the terms of a resolved configuration; raises UserError for a weight that is none."""
    diversity = config.diversity
    weights: dict[str, Any] = {term: getattr(diversity, term) or 0.0 for term in TERMS}
    variant = diversity.variant or "paper"
    return Objective(**weights, variant=variant, label_smoothing=config.augment.smoothing, class_loss=class_loss)


def refuse_idle_terms(config: Config, objective: Objective) -> None:
    """Raise UserError where a term has no weight to act on: with all tokens given, only heads learn."""
    idle = [term for term in TERMS if getattr(objective, term) and term != "mixing"]
    if config.model.freeze == BACKBONE and idle:
        what = f"with a frozen backbone the tokens never change, so these terms do nothing: {', '.join(idle)}"
        tip = "use --diversity none; of the terms only --mixing trains a head"
        raise UserError(what, "model.freeze (--freeze)", tip)


def bare(network: nn.Module) -> nn.Module:
    """Return the timm model inside a DiverseModel or a Segmenter."""
    model = network.inside
    assert isinstance(model, nn.Module)
    return model
