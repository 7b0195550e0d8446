"""Classification: one label per image, with the diversity terms on the patches."""

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pdvit.config.schema import AugmentConfig, Config
from pdvit.data.batch import Batch
from pdvit.data.loader import augmentation_for, eval_batches, train_batches
from pdvit.data.mixing import Mixing
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.resident import resident
from pdvit.data.sources import Source, open_source
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.engine.protocol import StepOutput
from pdvit.errors import UserError
from pdvit.models.build import build_model, checkpoint_activations, model_arguments, patch_size_of
from pdvit.models.freezing import freeze
from pdvit.models.layers import exact_float32
from pdvit.models.reading import layer_numbers
from pdvit.models.tokens import DiverseModel
from pdvit.models.weights import export
from pdvit.similarity import patch_similarity
from pdvit.tasks.base import ImageTask, describe_terms, objective_of, refuse_idle_terms
from pdvit.tasks.metrics import ClassificationMetric, evaluate_classification


class ClassificationTask(ImageTask):
    """Trains a timm model on a source of labelled images; see `pdvit.engine.protocol.Task`."""

    name = "classification"
    best_metric = "accuracy"

    def __init__(self, config: Config, source: Source, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> None:
        """Build model, batches and objective from a resolved configuration; raises UserError."""
        super().__init__(config, source, device, ranks)
        assert config.model.name is not None, "resolve the configuration first"
        arguments = model_arguments(config.model, config.data.img_size)
        model = build_model(config.model.name, arguments | {"num_classes": len(source.classes)})
        if config.model.grad_checkpointing:
            checkpoint_activations(model)
        diversity = config.diversity
        self.objective = objective_of(config)
        labels = self.objective.mixing > 0
        self.module: DiverseModel = DiverseModel(
            model,
            patch_head="class" if labels and diversity.patch_head == "class" else labels,
            first=diversity.first or "block",
            last=diversity.last or "norm",
            cosine_layers=layer_numbers(diversity.cosine_layers),
        ).to(device)
        if config.model.freeze is not None:
            freeze(self.module, config.model.freeze)
            refuse_idle_terms(config, self.objective)
        preprocessing = Preprocessing.for_model(model).changed(config.data)
        if config.augment.shift >= preprocessing.size:
            size = preprocessing.size
            what = f"a shift of up to {config.augment.shift} pixels leaves nothing of images of {size}x{size}"
            raise UserError(what, "augment.shift (--shift)", f"shift by less than {size}, for example {size // 8}")
        self.use(preprocessing)
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

    @staticmethod
    def open_source(config: Config, log: Callable[[str], None]) -> Source:
        """Open the data of a configuration; raises UserError."""
        return open_source(config.data)

    def describe(self) -> str:
        """Return two lines: model, image and patch size; terms, mixing and augmentation."""
        name, size = self.config.model.name, self.preprocessing.size
        parameters = sum(weight.numel() for weight in self.module.model.parameters())
        return (
            f"{name}: {parameters:,} parameters, {size}x{size} pixels, patches of {self.mixing.patch_size}\n"
            f"terms: {describe_terms(self.config.diversity)}; {_describe_mixing(self.config.augment)}; "
            f"augmentation: {self.augmentation.describe()}"
        )

    def load(self, log: Callable[[str], None]) -> None:
        """Bring small sets of image files onto the device; say what was chosen, and why. Raises UserError."""
        self.source = resident(self.source, self.loading, self.config.data.resident, log)

    def training_batches(self, start: int) -> Generator[Batch, None, None]:
        """Yield training batches from step `start` on, without end."""
        return train_batches(self.source.splits["train"], self.loading, self.config.augment, self.mixing, start)

    def step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """Run one forward pass and add up the objective."""
        smoothing = self.objective.label_smoothing
        in_parts = self.objective.mixing_is_patchwise
        output = network(batch.images, batch.patch_targets if in_parts else None, smoothing)
        weights = None if batch.weights is None else batch.weights[0]
        losses = self.objective(output, batch.targets, batch.patch_targets, weights)
        hard = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        accuracy = (output.logits.argmax(1) == hard).float().mean()
        parts = {name: value.detach() for name, value in losses.parts.items()}
        if batch.replaced is not None:  # a mean over the images, as all metrics, times the images: the number of a step
            parts["bad_images"] = batch.replaced.float().mean() * self.batch_size
        return StepOutput(losses.total, {"loss": losses.total.detach(), **parts, "accuracy": accuracy})

    def measure(self, network: nn.Module, split: str) -> tuple[dict[str, Any], int, str]:
        """Measure accuracy and loss on a split."""
        network.eval()
        batches = eval_batches(self.source.splits[split], self.loading)
        scores = evaluate_classification(
            lambda images: network(images, patch_logits=False).logits,
            batches,
            ClassificationMetric(len(self.source.classes), self.device),
            self.config.run.precision,
            self.ranks,
        )
        numbers = {"accuracy": scores.accuracy, "loss": scores.loss}
        return numbers, scores.images, f"accuracy {scores.accuracy:6.1%}  loss {scores.loss:.3f}"

    @torch.no_grad()
    def first_last(self, network: nn.Module) -> tuple[float, float]:
        """Return P of the very tokens that the losses compare, on the probe."""
        network.eval()
        with exact_float32(self.device):
            output = network(self.probe.images, patch_logits=False)
        return float(patch_similarity(output.first).mean()), float(patch_similarity(output.last).mean())

    def export(self, state: Mapping[str, Tensor], weights: str) -> dict[str, bytes]:
        """Return a timm folder of the bare model, without the patch head."""
        bare = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        return export(self.module.model, self.source.classes, self.preprocessing.as_timm(), weights, bare)


def _describe_mixing(augment: AugmentConfig) -> str:
    """Return the fraction of batches that CutMix and Mixup mix."""
    both = bool(augment.cutmix and augment.mixup)
    cutmix = augment.mixup_switch_prob if both else float(bool(augment.cutmix))
    mixup = 1 - cutmix if both else float(bool(augment.mixup))
    fractions = {"patch CutMix": cutmix * augment.mixup_prob, "Mixup": mixup * augment.mixup_prob}
    parts = [f"{name} on {fraction:.0%} of batches" for name, fraction in fractions.items() if fraction]
    return " and ".join(parts) or "no CutMix"
