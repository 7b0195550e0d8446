"""Models from checkpoints in one call."""

from pathlib import Path

from pdvit.models.loading import LoadedModel, load_model
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from pdvit.models.segmentation.files import LoadedSegmenter
from pdvit.models.segmentation.files import load_segmenter as load_resolved


def load(path: str | Path, model_name: str | None = None, weights: str | None = None) -> LoadedModel:
    return load_model(resolve_checkpoint(path, model_name, weights))


def load_segmenter(path: str | Path) -> LoadedSegmenter:
    return load_resolved(resolve_checkpoint(path))
