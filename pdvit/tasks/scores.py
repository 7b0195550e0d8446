"""What a classification is measured by: sums over images on the device, whose size depends on the classes alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.data.batch import Batch
from pdvit.engine.device import autocast
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError

TOP = 5
# Bins of equal width for the calibration error, and the confidences at which one ends and the next begins.
BINS = 15
EDGES = torch.arange(1, BINS, dtype=torch.float64) / BINS


@dataclass(frozen=True)
class Scores:
    """How well the images of a split are told apart.

    Attributes:
        images: how many were measured.
        accuracy: share of images whose most probable class is the right one.
        accuracy_top5: share whose right class is among the five most probable; None where there are fewer than five.
        loss: mean cross-entropy in nats, without label smoothing.
        calibration_error: expected calibration error, see `Tally.calibration_error`.
        broken: images whose logits are not all finite.
        confusion: images by class (rows) and most probable class (columns), `(C, C)` on the CPU; None where nobody
            asked for it.
    """

    images: int
    accuracy: float
    accuracy_top5: float | None
    loss: float
    calibration_error: float
    broken: int
    confusion: Tensor | None


class Tally:
    """Adds up batches. Nothing in it waits for the device, and no image is kept."""

    def __init__(self, classes: int, device: torch.device, confusion: bool = False) -> None:
        self.classes = classes
        self.counts = torch.zeros(4, dtype=torch.long, device=device)  # images, right, right in the top five, broken
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, right, sum of confidences
        self.edges = EDGES.to(device)
        # int32: with 21,841 classes this is 1.9 GB
        size = classes**2 if confusion else 0
        self.confusion = torch.zeros(size, dtype=torch.int32, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count the images of a batch: logits `(B, C)` in float32, class indices `(B,)`."""
        predicted = logits.argmax(1)
        right = predicted == targets
        among = (logits.topk(min(TOP, self.classes)).indices == targets[:, None]).any(1)
        broken = ~logits.isfinite().all(1)
        self.counts += torch.stack([torch.ones_like(right), right, among, broken]).sum(1)
        self.loss += F.cross_entropy(logits, targets, reduction="sum").double()
        confidence = logits.softmax(1).amax(1).double()
        inside = F.one_hot(torch.bucketize(confidence, self.edges), BINS).double()
        self.bins += torch.stack([torch.ones_like(confidence), right.double(), confidence]) @ inside
        if len(self.confusion):
            ones = torch.ones_like(targets, dtype=torch.int32)
            self.confusion.index_add_(0, targets * self.classes + predicted, ones)

    def scores(self, ranks: Ranks = SINGLE_PROCESS) -> Scores:
        """Return what the images of all processes come to; every process calls it and gets the same.

        Raises UserError where there is none.
        """
        images, right, among, broken = ranks.all_reduce(self.counts).tolist()
        if not images:
            raise UserError("none of the images decodes", "data.source (--data)", "replace them, or take another split")
        return Scores(
            images,
            right / images,
            among / images if self.classes >= TOP else None,
            float(ranks.all_reduce(self.loss)) / images,
            self.calibration_error(ranks.all_reduce(self.bins)),
            broken,
            ranks.all_reduce(self.confusion).view(self.classes, -1).cpu() if len(self.confusion) else None,
        )

    @staticmethod
    def calibration_error(bins: Tensor) -> float:
        """Return the expected calibration error, 0 to 1 (Guo et al. 2017, arXiv 1706.04599, equation 3).

        The images are sorted by confidence, the probability of the most probable class, into 15 bins of equal width,
        each open below and closed above; the error is the mean over images of |accuracy - mean confidence| of the bin.

        Args:
            bins: `(3, 15)`, by bin: images, those told right, sum of confidences.
        """
        images, right, confidence = bins
        return float((right - confidence).abs().sum() / images.sum())


@torch.no_grad()
def measure(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    tally: Tally,
    precision: str,
    ranks: Ranks = SINGLE_PROCESS,
) -> Scores:
    """Run a model over batches and return its scores: the one way, while training, after it and of any checkpoint.

    Args:
        logits_of: images `(B, 3, H, W)` to logits `(B, C)`, in evaluation mode.
        batches: every image exactly once, over all processes.
        tally: an empty one.
        precision: of the forward passes, `fp32`, `bf16` or `fp16`.
        ranks: the processes that share the batches.
    """
    for batch in batches:
        with autocast(batch.images.device, precision):
            logits = logits_of(batch.images).float()
        tally.add(logits, batch.targets)
    return tally.scores(ranks)
