"""What can be trained: each task opens its data, builds its model, and has a forward pass, an objective and metrics."""

from typing import TYPE_CHECKING

from pdvit.config.schema import Config

if TYPE_CHECKING:
    from pdvit.tasks.classification import ClassificationTask
    from pdvit.tasks.segmentation import SegmentationTask


def task_class(config: Config) -> "type[ClassificationTask | SegmentationTask]":
    """Return the task of a configuration: segmentation if `segment.head` is set, else classification."""
    if config.segment.head is not None:
        from pdvit.tasks.segmentation import SegmentationTask

        return SegmentationTask
    from pdvit.tasks.classification import ClassificationTask

    return ClassificationTask
