"""Classification: one label per image, with the diversity terms on the patches."""

from collections.abc import Generator, Iterator, Mapping

import torch
from torch import Tensor, nn

from pdvit.config.schema import Config
from pdvit.data.augment import Augmentation
from pdvit.data.loader import Batch, eval_batches, train_batches
from pdvit.data.mixing import Mixing, grid_of
from pdvit.data.sources.split import Source
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError
from pdvit.models.build import build_model, checkpoint_activations, model_arguments, sketch_model
from pdvit.models.checkpoints import export
from pdvit.models.layers import evaluating, image_size_of
from pdvit.models.tokens import DiverseModel
from pdvit.tasks.base import ImageTask, describe_terms, with_weights
from pdvit.tasks.metrics import ClassificationMetric, Metric
from pdvit.tasks.windows import Network


class ClassificationTask(ImageTask):
    """Trains a timm model on a source of labelled images; see `pdvit.engine.protocol.Task`."""

    name = "classification"
    best_metric = "accuracy"
    recorded = ("accuracy", "loss")
    module: DiverseModel

    def __init__(self, config: Config, source: Source, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> None:
        super().__init__(config, source, device, ranks)
        augment, size = config.augment, self.preprocessing.size
        if augment.shift >= size:
            what = f"a shift of up to {augment.shift} pixels leaves nothing of images of {size}x{size}"
            raise UserError(what, "augment.shift (--shift)", f"shift by less than {size}, for example {size // 8}")
        labels = self.objective.mixing > 0
        if augment.cutmix or labels:
            grid_of(size, size, self.patch_size)  # raises the error before the run
        self.mixing = Mixing(augment, self.patch_size, len(source.classes), labels)
        train, seed = source.splits["train"], config.run.seed
        self.augmentation = Augmentation.for_split(train, augment, self.preprocessing, seed)

    def build_module(self) -> DiverseModel:
        """Return a timm model that also returns its tokens, with a patch head if the mixing term is on."""
        config, diversity = self.config, self.config.diversity
        assert config.model.name is not None, "resolve the configuration first"
        classes = len(self.source.classes)
        arguments = model_arguments(config.model, config.data.img_size) | {"num_classes": classes}
        sketch = sketch_model(config.model.name, arguments)
        with torch.no_grad(), evaluating(sketch):
            logits = sketch(torch.empty(1, 3, *image_size_of(sketch), device="meta"))
        if logits.shape != (1, classes):
            what = f"the model returns {tuple(logits.shape)}, not a logit for each of {classes} classes"
            raise UserError(what, "model.args (--model-kwargs)", "leave global_pool out; pixels need --head")
        model = build_model(config.model.name, arguments)
        if config.model.grad_checkpointing:
            checkpoint_activations(model)
        mixing = self.objective.mixing > 0
        return DiverseModel(
            model,
            patch_head="class" if mixing and diversity.patch_head == "class" else mixing,
            first=diversity.first or "block",
            last=diversity.last or "norm",
            cosine_layers=diversity.cosine_layers.replace(",", " ").split(),
            compared=self.objective.contrastive > 0,
        )

    def describe(self) -> str:
        """Return three lines: model, image and patch size; terms and mixing; augmentation."""
        name, size, augment = self.config.model.name, self.preprocessing.size, self.config.augment
        parameters = sum(weight.numel() for weight in self.module.model.parameters())
        cutmix, mixup = float(bool(augment.cutmix)), float(bool(augment.mixup))
        if cutmix and mixup:
            cutmix, mixup = augment.mixup_switch_prob, 1 - augment.mixup_switch_prob
        fractions = {"patch CutMix": cutmix * augment.mixup_prob, "Mixup": mixup * augment.mixup_prob}
        mixing = [f"{method} on {fraction:.0%} of batches" for method, fraction in fractions.items() if fraction]
        return (
            f"{name}: {parameters:,} parameters, {size}x{size} pixels, patches of {self.patch_size}\n"
            f"terms: {describe_terms(self.config.diversity)}; {' and '.join(mixing) or 'no CutMix'}\n"
            f"augmentation: {self.augmentation.describe()}"
        )

    def batches(self, start: int) -> Generator[Batch]:
        """Yield training batches from step `start` on, without end, with the factors of scheduled terms."""
        batches = train_batches(self.source.splits["train"], self.loader, self.augmentation, self.mixing, start)
        return with_weights(batches, self.schedules, start) if self.scheduled else batches

    def step(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run forward pass and objective on one batch; return loss and metrics."""
        objective = self.objective
        patch_targets = batch.patch_targets if objective.mixing_is_patchwise else None
        output = network(batch.images, patch_targets, objective.label_smoothing)
        weights = None if batch.weights is None else batch.weights[0]
        anchor = None if self.anchor is None else self.anchor.last_tokens(batch.images)
        losses = objective(output, batch.targets, batch.patch_targets, weights, anchor)
        labels = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        accuracy = (output.logits.argmax(1) == labels).float().mean()
        return self.step_output(losses.total, {**losses.parts, "accuracy": accuracy}, batch)

    def evaluation(self, network: nn.Module, split: str) -> tuple[Network, Iterator[Batch], Metric, int]:
        """Return logits as a function of images, this rank's part of a split, its metric, and the images' side."""
        batches = eval_batches(self.source.splits[split], self.loader)
        metric = ClassificationMetric(len(self.source.classes), self.device)
        return lambda images: network(images, patch_logits=False).logits, batches, metric, self.preprocessing.size

    def export(self, state: Mapping[str, Tensor], weights: str) -> dict[str, bytes]:
        """Return a timm folder of the bare model, without the patch head."""
        bare = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        return export(self.module.model, self.source.classes, self.preprocessing.as_timm(), weights, bare)
