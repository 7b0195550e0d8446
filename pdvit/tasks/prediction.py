"""What a checkpoint says of images: the most probable classes, with their probabilities."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from pdvit.data.batch import Batch
from pdvit.engine.device import autocast


class Prediction(NamedTuple):
    """The most probable classes of one image: which one of the split, classes and probabilities, best first.

    `finite` tells whether its logits were; otherwise the rest means nothing.
    """

    image: int
    classes: list[int]
    probabilities: list[float]
    finite: bool


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch], top: int, precision: str) -> Iterator[Prediction]:
    """Yield the `top` most probable classes of every image, in order, from a bare model in evaluation mode."""
    for batch in batches:
        with autocast(batch.images.device, precision):
            logits = model(batch.images).float()
        best = logits.softmax(1).topk(top)
        columns = (batch.index, best.indices, best.values, logits.isfinite().all(1))
        for row in zip(*(column.tolist() for column in columns), strict=True):
            yield Prediction(*row)
