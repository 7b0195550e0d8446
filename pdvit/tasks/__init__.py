"""What can be trained: each task is a forward pass, an objective and its metrics."""

from pdvit.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
