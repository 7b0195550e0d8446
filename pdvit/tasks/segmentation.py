"""Segmentation: a class for every pixel, with the diversity terms on the patches of the backbone; masks as pictures."""

import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pdvit.config.schema import Config, SegmentConfig
from pdvit.data.images import decode_all
from pdvit.data.loader import Batch, LoaderConfig
from pdvit.data.masks.batches import eval_batches, evaluation_pixels, train_batches
from pdvit.data.masks.table import default_palette
from pdvit.data.sources.split import MaskSplit, Source, Split, subsample
from pdvit.engine.device import autocast
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError
from pdvit.losses.cross_entropy import IGNORED, pixel_loss
from pdvit.models.families import family_of
from pdvit.models.segmentation.segmenter import Segmenter, build_segmenter, export_segmenter
from pdvit.tasks.base import ImageTask, describe_terms, with_weights
from pdvit.tasks.metrics import Metric, SegmentationMetric, class_table, csv_bytes, unique_names
from pdvit.tasks.windows import Network, SlidingWindowConfig, score_rows

Palette = Sequence[tuple[int, int, int]]
# Colour of pixels without a class, and the opacity of a class's colour on an image.
UNLABELLED, OPACITY = (255, 255, 255), 0.6
# Number and longest side of the pictures that a run keeps.
PICTURES, LONGEST_SIDE = 8, 512


class SegmentationTask(ImageTask):
    """Trains a backbone with a head on a source of images with masks; see `pdvit.engine.protocol.Task`."""

    name = "segmentation"
    best_metric = "miou"
    recorded = ("miou", "accuracy", "accuracy_mean", "loss", "in_windows")
    module: Segmenter
    class_loss = staticmethod(pixel_loss)

    def __init__(self, config: Config, source: Source, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> None:
        super().__init__(config, source, device, ranks)
        self.windows = sliding_windows(self.module, self.module.segment, self.loader.per_pass)
        self.files: dict[str, bytes] = {}

    def build_module(self) -> Segmenter:
        """Return the backbone with its head; on several GPUs they share the statistics of batch norms."""
        module = build_segmenter(self.config, len(self.source.classes)).to(self.device)
        if self.device.type == "cuda" and self.ranks.world_size > 1:  # torch can on GPUs only
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return module

    def describe(self) -> str:
        """Return the model, crops and windows; terms and augmentation; a note if `segment.stride` has no effect."""
        segment, windows, (low, high) = self.config.segment, self.windows, self.config.segment.jitter
        parts = (self.module.inside, self.module.head)
        backbone, head = (sum(weight.numel() for weight in part.parameters()) for part in parts)
        evaluation = "whole images"
        if windows.mode == "slide":
            evaluation = f"windows of {windows.window}, {windows.stride} apart"
        elif segment.stride is not None:
            evaluation += f"\nnote: segment.stride = {segment.stride} has no effect: images are evaluated whole"
        return (
            f"{self.config.model.name} with {segment.head} head: {backbone:,} + {head:,} parameters\n"
            f"crops of {windows.window}x{windows.window} pixels, patches of {self.patch_size}; "
            f"evaluated: {evaluation}\nterms: {describe_terms(self.config.diversity)}\n"
            f"augmentation: scaled by {low:g} to {high:g}{', colours jittered' if segment.photometric else ''}"
        )

    def batches(self, start: int) -> Generator[Batch]:
        """Yield training batches from step `start` on, without end, with the factors of scheduled terms."""
        config, split = self.config, cast(MaskSplit, self.source.splits["train"])
        window, hflip = self.windows.window, config.augment.hflip
        batches = train_batches(split, self.loader, config.segment, window, start, hflip)
        return with_weights(batches, self.schedules, start) if self.scheduled else batches

    def step(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run forward pass and objective on one batch; return loss and metrics."""
        output, targets, size = network(batch.images), batch.targets, batch.targets.shape[-2:]
        output = output._replace(logits=self.module.resize(output.logits.float(), size))
        weights = None if batch.weights is None else batch.weights[0]
        anchor = None if self.anchor is None else self.anchor.last_tokens(batch.images)
        losses = self.objective(output, targets, None, weights, anchor)
        total, parts = losses.total, dict(losses.parts)
        if output.aux is not None:
            parts["aux"] = pixel_loss(self.module.resize(output.aux.float(), size), targets)
            total = total + self.config.segment.aux * parts["aux"]
        valid = targets != IGNORED
        correct = (output.logits.argmax(1) == targets) & valid
        parts["accuracy"] = (correct.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)).mean()
        return self.step_output(total, parts, batch)

    def evaluation(self, network: nn.Module, split: str) -> tuple[Network, Iterator[Batch], Metric, int]:
        """Return logits as a function of images, this rank's part of a split, its metric, and the side of windows."""
        batches = eval_batches(cast(MaskSplit, self.source.splits[split]), self.loader, self.config.segment)
        metric = SegmentationMetric(len(self.source.classes), self.windows, self.device)
        return pixel_network(network), batches, metric, self.windows.window

    def finish(self, network: nn.Module, weights: str) -> dict[str, Any]:
        """Measure the final split, and P of first and last on the probe; keep the table and a few predictions."""
        numbers = super().finish(network, weights)
        assert self.scores.confusion is not None
        table = class_table(self.scores.confusion, unique_names(self.source.classes), pixels=True)
        split, pixels = self.source.splits[self.source.final_split], pixel_network(network)
        pictures = prediction_pngs(pixels, split, self.source, self.loader, self.config, self.windows)
        self.files = {"iou.csv": csv_bytes(table)} | pictures
        return numbers

    def export(self, state: Mapping[str, Tensor], weights: str) -> dict[str, bytes]:
        """Return the weights of backbone and head with their configuration, the table and the pictures."""
        palette, preprocessing = self.source.palette or [], self.preprocessing.as_timm()
        return self.files | export_segmenter(self.module, self.source.classes, palette, preprocessing, weights, state)


def sliding_windows(module: Segmenter, segment: SegmentConfig, batch: int) -> SlidingWindowConfig:
    """Return how a model evaluates images, by mode, stride and crop, the side of windows; raises UserError."""
    window, any_size = segment.crop, module.adapter.any_size
    assert window is not None
    stride = segment.stride or max(1, window * 2 // 3)
    if stride > window:
        what = f"windows of {window} pixels that are {stride} apart leave gaps"
        raise UserError(what, "segment.stride (--stride)", f"choose at most {window}")
    mode = segment.mode or ("slide" if family_of(module.inside).plain or not any_size else "whole")
    if mode == "whole" and not any_size:
        what = f"the backbone takes images of {window}x{window} pixels alone, so none can be evaluated whole"
        tip = "leave it unset or choose slide: windows of the crop's size"
        raise UserError(what, "segment.mode (--eval-mode)", tip)
    return SlidingWindowConfig(mode, window, stride, batch)


def pixel_network(network: Any) -> Network:
    """Return a segmenter as a function from images `(B, 3, H, W)` to logits of their pixels `(B, C, H, W)`."""
    return lambda images: network.resize(network(images).logits.float(), images.shape[-2:])


@torch.no_grad()
def predict_masks(
    network: Network, split: Split, classes: int, loader: LoaderConfig, config: Config, windows: SlidingWindowConfig
) -> Iterator[tuple[int, Image.Image, Tensor]]:
    """Yield index, image and mask (uint8, of its size) of every image that decodes; `loader.bad` gets the others."""
    for index, image in decode_all(split, loader.bad):
        pixels = evaluation_pixels(image, config.segment.short_side, loader.preprocessing.interpolation)
        normalised, size = loader.preprocessing.normalise(pixels[None].to(loader.device)), (image.height, image.width)
        with autocast(loader.device, config.run.precision):
            blocks = score_rows(network, normalised, size, classes, windows)
            mask = torch.cat([scores.argmax(0).byte().cpu() for _, scores, _ in blocks])
        yield index, image, mask


def palette_image(mask: Tensor, palette: Palette) -> Image.Image:
    """Return a mask, uint8 `(H, W)`, as an image of its values with the colours of the classes; 255 is white."""
    colours = [*palette, *[(0, 0, 0)] * (255 - len(palette)), UNLABELLED]
    image = Image.fromarray(mask.numpy())
    image.putpalette([level for colour in colours for level in colour])
    return image


def overlay(image: Image.Image, mask: Tensor, palette: Palette) -> Image.Image:
    """Blend the colours of a mask into its image; pixels without a class stay as they are."""
    colours = Image.blend(image, palette_image(mask, palette).convert("RGB"), OPACITY)
    colours.paste(image, mask=Image.fromarray(np.where(mask.numpy() == 255, 255, 0).astype(np.uint8)))
    return colours


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def prediction_pngs(
    network: Network, split: Split, source: Source, loader: LoaderConfig, config: Config, windows: SlidingWindowConfig
) -> dict[str, bytes]:
    """Return small PNG files of image, truth and prediction, for images spread evenly over a split."""
    chosen, classes = subsample(split, PICTURES), len(source.classes)
    assert isinstance(chosen, MaskSplit)
    files, palette = dict[str, bytes](), source.palette or default_palette(classes)
    predicted = predict_masks(network, chosen, classes, loader, config, windows)
    for number, (index, image, mask) in enumerate(predicted, 1):
        masks = {"truth": chosen.mask(index), "prediction": mask}
        pictures = {"image": image} | {name: palette_image(mask, palette) for name, mask in masks.items()}
        for name, picture in pictures.items():
            box = Image.Resampling.NEAREST if picture.mode == "P" else Image.Resampling.BOX
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), box)
            files[f"predictions/{number:02}-{name}.png"] = png(picture)
    return files
