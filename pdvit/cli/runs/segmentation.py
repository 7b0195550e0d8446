"""Segmentation, as the commands that train see it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.cli.runs.classification import closing_words, terms_of
from pdvit.cli.runs.command import Kind
from pdvit.config.schema import Config

if TYPE_CHECKING:
    import torch

    from pdvit.data.sources import Source
    from pdvit.engine.distributed import Ranks
    from pdvit.tasks.segmentation import SegmentationTask


def _open(config: Config, say: Callable[[str], None]) -> "Source":
    from pdvit.data.masks.sources import open_masks

    return open_masks(config.data, config.segment, say)


def _settle(config: Config, processes: int, device: "torch.device") -> Config:
    """Choose the norm of the head: a batch norm can't have the statistics of a single image."""
    from pdvit.models.segmentation.norms import settle_norm

    share = max(1, config.data.batch_size // processes)
    most = min(config.data.micro_batch or share, share)
    least = min(most, share % most or most)  # the last part of a batch may be shorter
    joined = least * processes if device.type == "cuda" else least  # by SyncBatchNorm, which needs GPUs
    return replace(config, segment=replace(config.segment, norm=settle_norm(config.segment, joined)))


def _make_task(config: Config, source: "Source", device: "torch.device", ranks: "Ranks") -> "SegmentationTask":
    from pdvit.tasks.segmentation import SegmentationTask

    return SegmentationTask(config, source, device, ranks)


def _describe(config: Config, task: "SegmentationTask") -> str:
    """Say what is trained: backbone and head, the crops, how images are evaluated, and what is added to the loss.

    Only the task knows whether images are evaluated whole: a stride in vain is said here, as other idle settings are.
    """
    module, segment, how = task.module, config.segment, task.how
    total, backbone = (sum(weight.numel() for weight in part.parameters()) for part in (module, module.inside))
    model = f"{config.model.name} with {segment.head} head: {backbone:,} + {total - backbone:,} parameters"
    windows = f"windows of {how.window}, {how.stride} apart" if how.mode == "slide" else "whole images"
    if how.mode == "whole" and segment.stride is not None:
        windows += f"\nnote: segment.stride = {segment.stride} has no effect: images are evaluated whole"
    least, most = segment.jitter
    colours = ", colours jittered" if segment.photometric else ""
    return (
        f"{model}, crops of {how.window}x{how.window} pixels, patches of {task.patch_size}; evaluated: {windows}\n"
        f"terms: {terms_of(config)}; augmentation: scaled by {least:g} to {most:g}{colours}"
    )


def _conclude(summary: Mapping[str, Any]) -> str:
    """Say how well the pixels are told apart, and P of first and last."""
    large = summary.get("in_windows")
    note = f" ({large} images are too large to be evaluated whole, and were in windows)" if large else ""
    return (
        f"{summary['split']} mIoU {summary['miou']:.1%}, accuracy {summary['accuracy']:.1%} of pixels and "
        f"{summary['accuracy_mean']:.1%} by class, loss {summary['loss']:.3f}{note}{closing_words(summary)}"
    )


def _use(run: Path) -> str:
    return f"pdvit eval, predict and plot segmentation {run}; pictures: {run}/predictions"


SEGMENTATION = Kind(_open, _settle, _make_task, _describe, _conclude, _use)
