"""Segmentation: a class for every pixel, with the diversity terms on the patches of the backbone."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pdvit.config.schema import Config, SegmentConfig
from pdvit.data.batch import Batch
from pdvit.data.loader import LoaderConfig
from pdvit.data.masks.batches import eval_batches, train_batches
from pdvit.data.masks.folders import open_masks
from pdvit.data.masks.split import MaskSplit
from pdvit.data.masks.table import default_palette
from pdvit.data.pictures import Pictures
from pdvit.data.preprocessing import Preprocessing, try_read
from pdvit.data.sources import Source
from pdvit.engine.device import autocast
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.engine.protocol import StepOutput
from pdvit.errors import UserError
from pdvit.losses.cross_entropy import IGNORED, pixel_loss
from pdvit.models.build import patch_size_of
from pdvit.models.families import family_of
from pdvit.models.freezing import freeze
from pdvit.models.reading import layers_to_read
from pdvit.models.segmentation.files import export_segmenter
from pdvit.models.segmentation.norms import settle_norm, share_statistics
from pdvit.models.segmentation.segmenter import Segmenter, SegmentOutput, build_segmenter
from pdvit.tasks.base import ImageTask, bare, describe_terms, objective_of, refuse_idle_terms
from pdvit.tasks.mask_pictures import as_palette, png, predicted_mask, shown
from pdvit.tasks.metrics import SegmentationMetric, class_table, csv_bytes, evaluate_segmentation, unique_names
from pdvit.tasks.windows import Network, SlidingWindowConfig

# Images of the final split whose predictions are kept.
PICTURES = 8


class SegmentationTask(ImageTask):
    """Trains a backbone with a head on a source of images with masks; see `pdvit.engine.protocol.Task`."""

    name = "segmentation"
    best_metric = "miou"

    def __init__(self, config: Config, source: Source, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> None:
        """Build model, batches and objective from a resolved configuration; raises UserError."""
        super().__init__(config, source, device, ranks)
        self.classes = len(source.classes)
        self.module: Segmenter = build_segmenter(config, self.classes).to(device)
        share_statistics(self.module, device, ranks.world_size)
        self.objective = objective_of(config, pixel_loss)
        if config.model.freeze is not None:
            freeze(self.module, config.model.freeze)
            refuse_idle_terms(config, self.objective)
        backbone = self.module.inside
        self.use(Preprocessing.for_model(backbone).changed(config.data))
        self.patch_size = patch_size_of(backbone)
        diversity = config.diversity  # what the losses compare, or would compare by default
        layers = layers_to_read(bare(self.module), diversity.first or "block", diversity.last or "norm", ())
        self.compared = layers.first, layers.last
        self.how = looking(self.module, self.module.segment, self.loading.per_pass)
        self.files: dict[str, bytes] = {}

    @staticmethod
    def open_source(config: Config, log: Callable[[str], None]) -> Source:
        """Open the images and masks of a configuration; raises UserError."""
        return open_masks(config.data, config.segment, log)

    @classmethod
    def resolve(cls, config: Config, world_size: int, device: torch.device) -> Config:
        """Choose the norm of the head: a batch norm has no statistics of a single image. Raises UserError."""
        per_rank = max(1, config.data.batch_size // world_size)
        micro_batch = min(config.data.micro_batch or per_rank, per_rank)
        smallest = min(micro_batch, per_rank % micro_batch or micro_batch)  # the last part of a batch may be shorter
        normalised = smallest * world_size if device.type == "cuda" else smallest  # SyncBatchNorm needs GPUs
        return replace(config, segment=replace(config.segment, norm=settle_norm(config.segment, normalised)))

    def describe(self) -> str:
        """Return the model, crops and windows; terms and augmentation; a note if `segment.stride` has no effect."""
        segment, windows = self.config.segment, self.how
        total, backbone = (
            sum(weight.numel() for weight in part.parameters()) for part in (self.module, self.module.inside)
        )
        evaluation = "whole images"
        if windows.mode == "slide":
            evaluation = f"windows of {windows.window}, {windows.stride} apart"
        elif segment.stride is not None:
            evaluation += f"\nnote: segment.stride = {segment.stride} has no effect: images are evaluated whole"
        low, high = segment.jitter
        colours = ", colours jittered" if segment.photometric else ""
        return (
            f"{self.config.model.name} with {segment.head} head: {backbone:,} + {total - backbone:,} parameters, "
            f"crops of {windows.window}x{windows.window} pixels, patches of {self.patch_size}; "
            f"evaluated: {evaluation}\n"
            f"terms: {describe_terms(self.config.diversity)}; augmentation: scaled by {low:g} to {high:g}{colours}"
        )

    def load(self, log: Callable[[str], None]) -> None:
        """Leave the data where they are: images with masks are read when they are needed."""

    def training_batches(self, start: int) -> Generator[Batch, None, None]:
        """Yield training batches from step `start` on, without end."""
        hflip = self.config.augment.hflip
        return train_batches(self._split("train"), self.loading, self.config.segment, self.how.window, start, hflip)

    def step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """Run one forward pass and add up the objective."""
        output = network(batch.images)
        output = SegmentOutput(self._resized(output.logits, batch.targets), *output[1:])
        weights = None if batch.weights is None else batch.weights[0]
        tokens: Any = output  # without mixing the objective reads logits and, where a term is on, first and last
        losses = self.objective(tokens, batch.targets, None, weights)
        total, parts = losses.total, dict(losses.parts)
        if output.aux is not None:
            parts["aux"] = pixel_loss(self._resized(output.aux, batch.targets), batch.targets)
            total = total + self.config.segment.aux * parts["aux"]
        valid = batch.targets != IGNORED
        right = (output.logits.argmax(1) == batch.targets) & valid
        parts["accuracy"] = (right.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)).mean()
        if batch.replaced is not None:  # a mean over the images, as all metrics, times the images: the number of a step
            parts["bad_images"] = batch.replaced.float().mean() * self.batch_size
        return StepOutput(total, {"loss": total.detach(), **{name: part.detach() for name, part in parts.items()}})

    def measure(self, network: nn.Module, split: str) -> tuple[dict[str, Any], int, str]:
        """Measure mIoU, accuracies and loss on a split."""
        network.eval()
        self.scores = evaluate_segmentation(
            pixel_network(network),
            eval_batches(self._split(split), self.loading, self.config.segment),
            SegmentationMetric(self.classes, self.device),
            self.how,
            self.config.run.precision,
            self.ranks,
            in_lockstep=self.config.run.distribute == "fsdp",
        )
        numbers = self.scores.record()
        words = f"mIoU {self.scores.miou:6.1%}  accuracy {self.scores.accuracy:6.1%}  loss {self.scores.loss:.3f}"
        return numbers, self.scores.images, words

    def finish(self, network: nn.Module, weights: str) -> dict[str, Any]:
        """Measure the final split, and P of first and last on the probe; keep the table and a few predictions."""
        numbers = super().finish(network, weights)
        table = class_table(self.scores.confusion, unique_names(self.source.classes), self.scores.iou)
        self.files = {"iou.csv": csv_bytes(table)}
        split = Pictures("pictures", self._split(self.source.final_split)).subsample(PICTURES).split
        assert isinstance(split, MaskSplit)
        self.files |= pictures(pixel_network(network), split, self.source, self.loading, self.config, self.how)
        return numbers

    def first_last(self, network: nn.Module) -> tuple[float, float]:
        """Return P of the layers that the losses compare, or would compare by default, on the probe."""
        found = dict(zip(*self.probe.similarity(bare(network), network), strict=True))
        first, last = self.compared
        return found[first], found[last]

    def export(self, state: Mapping[str, Tensor], weights: str) -> dict[str, bytes]:
        """Return the weights of backbone and head with all that is needed to use them, the table and the pictures."""
        palette, preprocessing = self.source.palette or [], self.preprocessing.as_timm()
        return self.files | export_segmenter(self.module, self.source.classes, palette, preprocessing, weights, state)

    def _split(self, name: str) -> MaskSplit:
        split = self.source.splits[name]
        assert isinstance(split, MaskSplit)
        return split

    def _resized(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Bring logits to the size of training crops."""
        height, width = masks.shape[-2:]
        return self.module.resize(logits.float(), (height, width))


def looking(module: Segmenter, segment: SegmentConfig, batch: int) -> SlidingWindowConfig:
    """Return how a model looks at images in evaluation; UserError where windows would leave gaps.

    `segment` says mode, stride and the side of windows, its crop; `batch` is the most windows of a forward pass.
    """
    window = segment.crop
    assert window is not None
    stride = segment.stride or max(1, window * 2 // 3)
    if stride > window:
        what = f"windows of {window} pixels that are {stride} apart leave gaps"
        raise UserError(what, "segment.stride (--stride)", f"choose at most {window}")
    windows = family_of(module.inside).plain or not module.adapter.any_size
    mode = segment.mode or ("slide" if windows else "whole")
    if mode == "whole" and not module.adapter.any_size:
        what = f"the backbone takes images of {window}x{window} pixels alone, so none can be evaluated whole"
        raise UserError(
            what, "segment.mode (--eval-mode)", "leave it unset or choose slide: windows of the crop's size"
        )
    return SlidingWindowConfig(mode, window, stride, batch)


def pixel_network(network: nn.Module) -> Network:
    """Return a segmenter as a function from images `(B, 3, H, W)` to logits of their pixels `(B, C, H, W)`."""

    def logits_of(images: Tensor) -> Tensor:
        segmenter: Any = network
        height, width = images.shape[-2:]
        logits: Tensor = segmenter.resize(segmenter(images).logits.float(), (height, width))
        return logits

    return logits_of


def pictures(
    network: Network, split: MaskSplit, source: Source, loading: LoaderConfig, config: Config, how: SlidingWindowConfig
) -> dict[str, bytes]:
    """Return image, truth and prediction of each image of a split as PNG files, small enough to be looked at."""
    files, palette = dict[str, bytes](), source.palette or default_palette(len(source.classes))
    alone = replace(loading, rank=0, processes=1)
    for number, batch in enumerate(eval_batches(split, alone, config.segment), 1):
        truth, image = batch.targets[0], try_read(split, int(batch.index))
        assert isinstance(image, Image.Image), "it was decoded a moment ago"
        height, width = truth.shape
        with autocast(loading.device, config.run.precision):
            mask = predicted_mask(network, batch.images, (height, width), len(source.classes), how)
        parts = {
            "image": image,
            "truth": as_palette(truth.byte().cpu(), palette),
            "prediction": as_palette(mask, palette),
        }
        files |= {f"predictions/{number:02}-{name}.png": png(shown(part)) for name, part in parts.items()}
    return files
