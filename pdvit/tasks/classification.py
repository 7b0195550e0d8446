"""Classification: one label per image, with the diversity terms on the patches."""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pdvit.config.schema import Config
from pdvit.data.bad_images import BadImages, describe_bad
from pdvit.data.batch import Batch
from pdvit.data.images import Preprocessing
from pdvit.data.loader import Loading, augmentation_for, eval_batches, steps_per_epoch, train_batches
from pdvit.data.mixing import Mixing
from pdvit.data.pictures import Pictures
from pdvit.data.randomness import fold
from pdvit.data.resident import resident
from pdvit.data.sources import Source
from pdvit.engine.protocol import StepOutput
from pdvit.engine.ranks import ALONE, Ranks
from pdvit.errors import UserError
from pdvit.losses import TERMS, Objective
from pdvit.models.build import build_model, checkpoint_activations, model_arguments, patch_size_of
from pdvit.models.freezing import BACKBONE, freeze
from pdvit.models.layers import exact_float32, measure_layers
from pdvit.models.reading import layer_numbers
from pdvit.models.tokens import DiverseModel
from pdvit.models.weights import export
from pdvit.similarity import patch_similarity
from pdvit.tasks.scores import Scores, Tally, measure
from pdvit.tasks.weights import weight_schedules, with_weights

BARS = "▁▂▃▄▅▆▇█"


class ClassificationTask:
    """Trains a timm model on a source of labelled images; see `pdvit.engine.protocol.Task`."""

    best_metric = "accuracy"

    def __init__(self, config: Config, source: Source, device: torch.device, ranks: Ranks = ALONE) -> None:
        """Build model, batches and objective from a resolved configuration; raises UserError."""
        self.config, self.source, self.device, self.ranks = config, source, device, ranks
        torch.manual_seed(config.run.seed)
        assert config.model.name is not None, "resolve the configuration first"
        arguments = model_arguments(config.model, config.data.img_size)
        model = build_model(config.model.name, arguments | {"num_classes": len(source.classes)})
        if config.model.grad_checkpointing:
            checkpoint_activations(model)
        diversity = config.diversity
        weights: dict[str, Any] = {term: getattr(diversity, term) or 0.0 for term in TERMS}
        variant = diversity.variant or "paper"
        self.objective = Objective(**weights, variant=variant, label_smoothing=config.augment.smoothing)
        labels = self.objective.mixing > 0
        self.module = DiverseModel(
            model,
            patch_head="class" if labels and diversity.patch_head == "class" else labels,
            first=diversity.first or "block",
            last=diversity.last or "norm",
            cosine_layers=layer_numbers(diversity.cosine_layers),
        ).to(device)
        if config.model.freeze is not None:
            freeze(self.module, config.model.freeze)
            self._refuse_idle_terms(weights)
        self.preprocessing = Preprocessing.for_model(model).changed(config.data)
        if config.augment.shift >= self.preprocessing.size:
            size = self.preprocessing.size
            what = f"a shift of up to {config.augment.shift} pixels leaves nothing of images of {size}x{size}"
            raise UserError(what, "augment.shift (--shift)", f"shift by less than {size}, for example {size // 8}")
        self.batch_size = config.data.batch_size
        if self.batch_size % ranks.size:
            raise UserError(
                f"{ranks.size} processes can't share batches of {self.batch_size} evenly",
                "data.batch_size (--batch-size)",
                f"choose a multiple of {ranks.size}",
            )
        self.steps_per_epoch = steps_per_epoch(source.splits["train"], self.batch_size)
        self.schedules = weight_schedules(config, self.steps_per_epoch, self.batch_size)
        self.bad = BadImages(skip=config.data.on_bad_image == "skip")
        self.named: set[str] = set()  # of the bad images, those that were shown
        self.loading = Loading(
            self.batch_size,
            config.run.seed,
            config.data.workers,
            device,
            self.preprocessing,
            config.data.micro_batch,
            ranks.rank,
            ranks.size,
            self.bad,
        )
        self.mixing = Mixing(
            config.augment.cutmix or 0.0,
            config.augment.mixup_prob,
            patch_size_of(model),
            len(source.classes),
            labels,
            config.augment.mixup_mode,
            config.augment.mixup,
            config.augment.mixup_switch_prob,
        )
        self.augmentation = augmentation_for(source.splits["train"], self.loading, config.augment)
        self.fingerprint = source.fingerprint()
        self._probe: Tensor | None = None
        if ranks.rank:  # the weights are the same on all processes; what drop path draws is not
            torch.manual_seed(fold(config.run.seed, ranks.rank))

    def _refuse_idle_terms(self, weights: Mapping[str, float]) -> None:
        """Raise UserError where a term has no weight to act on: with all tokens given, only heads learn."""
        idle = [term for term, weight in weights.items() if weight and term != "mixing"]
        if self.config.model.freeze == BACKBONE and idle:
            what = f"with a frozen backbone the tokens never change, so these terms do nothing: {', '.join(idle)}"
            tip = "use --diversity none; of the terms only --mixing trains a head"
            raise UserError(what, "model.freeze (--freeze)", tip)

    def load(self, say: Callable[[str], None]) -> None:
        """Bring small sets of image files onto the device; say what was chosen, and why. Raises UserError."""
        self.source = resident(self.source, self.loading, self.config.data.resident, say)

    def batch_of(self, tensors: Mapping[str, Tensor]) -> Batch:
        """Return the batch that gave these tensors."""
        return Batch(**tensors)

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """Yield training batches from step `start` on, without end."""
        train = self.source.splits["train"]
        batches = train_batches(train, self.loading, self.config.augment, self.mixing, start)
        if all(schedule.constant for schedule in self.schedules):
            return batches
        return with_weights(batches, self.schedules, start)

    def step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """Run one forward pass and add up the objective."""
        smoothing = self.objective.label_smoothing
        in_parts = self.objective.in_parts
        output = network(batch.images, batch.patch_targets if in_parts else None, smoothing)
        weights = None if batch.weights is None else batch.weights[0]
        losses = self.objective(output, batch.targets, batch.patch_targets, weights)
        hard = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        accuracy = (output.logits.argmax(1) == hard).float().mean()
        parts = {name: value.detach() for name, value in losses.parts.items()}
        if batch.replaced is not None:  # a mean over the images, as all metrics, times the images: the number of a step
            parts["bad_images"] = batch.replaced.float().mean() * self.batch_size
        return StepOutput(losses.total, {"loss": losses.total.detach(), **parts, "accuracy": accuracy})

    def evaluate(self, network: nn.Module) -> tuple[Mapping[str, Mapping[str, Any]], str]:
        """Measure accuracy and loss on the validation split, and P of every layer on the probe."""
        scores = self._scores(network, "val")
        names, values = self._similarity(network)
        records = {
            "eval": {"split": "val", "accuracy": scores.accuracy, "loss": scores.loss, **self._left_out(scores, "val")},
            "similarity": {"images": len(self._probe_images()), "layers": names, "similarity": values},
        }
        bars = "".join(BARS[min(7, int(value * 8))] if value >= 0 else "?" for value in values)
        headline = (
            f"val accuracy {scores.accuracy:6.1%}  loss {scores.loss:.3f}  "
            f"P {names[0]} {values[0]:.2f} {bars} {names[-1]} {values[-1]:.2f}"
        )
        broken = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        if broken:
            headline += (
                f"\nwarning: tokens are infinite or no numbers in {', '.join(broken)}, so there is no P. Start a new "
                f"run with a lower --lr, or with --clip-grad 1"
            )
        if values[-1] > self.config.run.warn_similarity:
            headline += (
                f"\nwarning: P of {names[-1]} is {values[-1]:.2f}: the patches are collapsing into one another. Try a "
                f"larger --cosine, a lower --lr or a longer --warmup-epochs (--warn-similarity sets the threshold)"
            )
        skipped = self._newly_skipped()
        return records, headline + (f"\nskipped, as they do not decode: {skipped}" if skipped else "")

    def finish(self, network: nn.Module, weights: str) -> dict[str, Any]:
        """Measure the final split, and P of first and last on the probe."""
        split = self.source.final_split
        scores = self._scores(network, split)
        first, last = self._first_last_similarity(network)
        skipped = self._newly_skipped()
        return {
            "task": "classification",
            "split": split,
            "accuracy": scores.accuracy,
            "loss": scores.loss,
            **self._left_out(scores, split),
            **({"skipped": skipped} if skipped else {}),
            "similarity_first": first,
            "similarity_last": last,
            "weights": weights,
        }

    def export(self, state: Mapping[str, Tensor], weights: str) -> dict[str, bytes]:
        """Return a timm folder of the bare model, without the patch head."""
        bare = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        return export(self.module.model, self.source.classes, self.preprocessing.as_timm(), weights, bare)

    def _scores(self, network: nn.Module, split: str) -> Scores:
        """Measure a split; every image counts exactly once, over all processes."""
        network.eval()
        batches = eval_batches(self.source.splits[split], self.loading)
        return measure(
            lambda images: network(images, patch_logits=False).logits,
            batches,
            Tally(len(self.source.classes), self.device),
            self.config.run.precision,
            self.ranks,
        )

    def _left_out(self, scores: Scores, split: str) -> dict[str, int]:
        """Say how many images a split lacks, where those that do not decode are skipped."""
        return {"bad_images": len(self.source.splits[split]) - scores.images} if self.bad.skip else {}

    def _newly_skipped(self) -> str:
        """Name the images that were skipped and not named before; every process has met others."""
        found: dict[str, str] = {}
        for part in self.ranks.gather(self.bad.found) if self.bad.skip else []:
            found |= part
        new = {name: reason for name, reason in found.items() if name not in self.named}
        self.named |= set(new)
        return describe_bad(new)

    def _similarity(self, network: nn.Module) -> tuple[list[str], list[float]]:
        """Return the layers and P of each on the probe; every process measures all of it."""
        network.eval()
        images = self._probe_images()
        found = measure_layers(bare(network), images, lambda tokens: patch_similarity(tokens).mean(), network)
        return [layer.name for layer in found], torch.stack(list(found.values())).tolist()

    @torch.no_grad()
    def _first_last_similarity(self, network: nn.Module) -> tuple[float, float]:
        """Return P of the very tokens that the losses compare, on the probe."""
        network.eval()
        with exact_float32(self.device):
            output = network(self._probe_images(), patch_logits=False)
        return float(patch_similarity(output.first).mean()), float(patch_similarity(output.last).mean())

    def _probe_images(self) -> Tensor:
        """Return the probe: validation images spread evenly over the split, `(B, 3, H, W)`, always the same."""
        if self._probe is None:
            pictures = Pictures("probe", self.source.splits["val"]).first(self.config.run.probe_images)
            batches = [
                batch.images for batch in eval_batches(pictures.split, replace(self.loading, rank=0, processes=1))
            ]
            if not batches:
                raise UserError("none of the probe's images decodes", "run.probe_images", "raise it, or replace them")
            self._probe = torch.cat(batches)
        return self._probe


def bare(network: nn.Module) -> nn.Module:
    """Return the timm model inside a DiverseModel or a Segmenter."""
    model = network.inside
    assert isinstance(model, nn.Module)
    return model
