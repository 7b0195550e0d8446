"""Metrics of a split, accumulated on the device: accuracy, calibration, IoU and the confusion matrix.

The interface is torchmetrics': `update` adds images, `compute` adds up the ranks, `reset` starts anew.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.data.batch import Batch
from pdvit.engine.device import autocast
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError
from pdvit.losses.cross_entropy import IGNORED
from pdvit.tasks.windows import Network, SlidingWindowConfig, score_rows

if TYPE_CHECKING:
    import pandas as pd

TOP = 5
# Bins of equal width for the calibration error, and their inner edges.
BINS = 15
EDGES = torch.arange(1, BINS, dtype=torch.float64) / BINS


@dataclass(frozen=True)
class ClassificationScores:
    """Classification metrics of a split; fractions of its images."""

    images: int
    accuracy: float
    accuracy_top5: float | None  # None below five classes
    loss: float  # mean cross-entropy in nats, without label smoothing
    calibration_error: float
    broken: int  # images with logits that are not finite
    confusion: Tensor | None  # images by class (rows) and prediction, `(C, C)` on the CPU; None if not requested


@dataclass(frozen=True)
class SegmentationScores:
    """Segmentation metrics of a split; fractions of the pixels that have a class."""

    images: int
    miou: float  # mean of `iou` over the classes that have one
    accuracy: float
    accuracy_mean: float  # mean over the classes of the accuracy of their pixels
    loss: float  # mean cross-entropy in nats; of several views, that of their mean probability
    broken: int  # images with scores that are not finite
    large: int  # images that were too large for a single pass and were evaluated in windows
    iou: Tensor  # intersection over union of each class `(C,)`; NaN if it is neither present nor predicted
    confusion: Tensor  # pixels by class (rows) and prediction, `(C, C)` on the CPU

    def record(self) -> dict[str, Any]:
        """Return the numbers for records and summaries, by name."""
        numbers = {name: getattr(self, name) for name in ("miou", "accuracy", "accuracy_mean", "loss")}
        return numbers | ({"in_windows": self.large} if self.large else {})


class ClassificationMetric:
    """Accumulates logits. Nothing waits for the device, and no image is kept."""

    def __init__(self, classes: int, device: torch.device, confusion: bool = False) -> None:
        self.classes, self.device, self.edges = classes, device, EDGES.to(device)
        self.cells = classes**2 if confusion else 0
        self.reset()

    def reset(self) -> None:
        """Set all sums to zero."""
        self.counts = torch.zeros(4, dtype=torch.long, device=self.device)  # images, correct, in the top five, broken
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=self.device)  # images, correct, sum of confidences
        # int32: with 21,841 classes this is 1.9 GB
        self.confusion = torch.zeros(self.cells, dtype=torch.int32, device=self.device)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits `(B, C)` in float32, class indices `(B,)`."""
        predicted = logits.argmax(1)
        correct = predicted == targets
        in_top = (logits.topk(min(TOP, self.classes)).indices == targets[:, None]).any(1)
        broken = ~logits.isfinite().all(1)
        self.counts += torch.stack([torch.ones_like(correct), correct, in_top, broken]).sum(1)
        self.loss += F.cross_entropy(logits, targets, reduction="sum").double()
        confidence = logits.softmax(1).amax(1).double()
        inside = F.one_hot(torch.bucketize(confidence, self.edges), BINS).double()
        self.bins += torch.stack([torch.ones_like(confidence), correct.double(), confidence]) @ inside
        if self.cells:
            ones = torch.ones_like(targets, dtype=torch.int32)
            self.confusion.index_add_(0, targets * self.classes + predicted, ones)

    def compute(self, ranks: Ranks = SINGLE_PROCESS) -> ClassificationScores:
        """Return the metrics over the images of all ranks, on each rank; raises UserError if there are no images."""
        images, correct, in_top, broken = ranks.all_reduce(self.counts).tolist()
        if not images:
            raise UserError("none of the images decodes", "data.source (--data)", "replace them, or take another split")
        return ClassificationScores(
            images,
            correct / images,
            in_top / images if self.classes >= TOP else None,
            float(ranks.all_reduce(self.loss)) / images,
            calibration_error(ranks.all_reduce(self.bins)),
            broken,
            ranks.all_reduce(self.confusion).view(self.classes, -1).cpu() if self.cells else None,
        )


def calibration_error(bins: Tensor) -> float:
    """Return the expected calibration error, 0 to 1 (Guo et al. 2017, arXiv 1706.04599, equation 3).

    It is the mean over images of |accuracy - mean confidence| of their bin. `bins` `(3, 15)` holds for each bin the
    number of images, of correct ones, and the sum of confidences, the probabilities of the most probable classes. Bins
    are of equal width, open below and closed above.
    """
    images, correct, confidence = bins
    return float((correct - confidence).abs().sum() / images.sum())


class SegmentationMetric:
    """Accumulates the confusion matrix of pixels (integers, on the device) and their loss."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes, self.device = classes, device
        self.reset()

    def reset(self) -> None:
        """Set all sums to zero."""
        self.confusion = torch.zeros(self.classes, self.classes, dtype=torch.long, device=self.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.counts = torch.zeros(3, dtype=torch.long, device=self.device)  # images, broken, large

    def update(self, blocks: Iterable[tuple[int, Tensor]], mask: Tensor, large: bool = False) -> None:
        """Add an image: first row and scores `(C, R, W)` of each block of its rows, and the mask `(H, W)`."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for top, scores in blocks:
            rows = mask[top : top + scores.shape[1]]
            pairs = torch.where(rows == IGNORED, self.classes**2, rows * self.classes + scores.argmax(0))
            with _nondeterministic_kernels():
                counts = pairs.flatten().bincount(minlength=self.classes**2 + 1)
                losses = F.cross_entropy(scores[None], rows[None], ignore_index=IGNORED, reduction="none")
            self.confusion += counts[:-1].view_as(self.confusion)
            self.loss += losses.sum(dtype=torch.float64)
            finite &= scores.isfinite().all()
        self.counts += torch.stack([torch.ones_like(finite), ~finite, torch.full_like(finite, large)])

    def compute(self, ranks: Ranks = SINGLE_PROCESS) -> SegmentationScores:
        """Return the metrics over the images of all ranks, on each rank; raises UserError if no pixel has a class."""
        confusion = ranks.all_reduce(self.confusion).cpu()
        images, broken, large = ranks.all_reduce(self.counts).tolist()
        pixels, correct = confusion.sum(), confusion.diagonal().double()
        if not pixels:
            what = "no image decodes" if not images else f"none of the pixels of {images} masks has a class"
            raise UserError(what, "data.source (--data)", "check the masks: --check-masks")
        present, predicted = confusion.sum(1), confusion.sum(0)
        iou = correct / (present + predicted - correct)
        return SegmentationScores(
            images,
            float(iou.nanmean()),
            float(correct.sum() / pixels),
            float((correct / present).nanmean()),
            float(ranks.all_reduce(self.loss) / pixels),
            broken,
            large,
            iou,
            confusion,
        )


@contextmanager
def _nondeterministic_kernels() -> Iterator[None]:
    """Leave deterministic mode: sums of integers do not depend on their order, nor does a loss per pixel."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@torch.no_grad()
def evaluate_classification(
    network: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    metric: ClassificationMetric,
    precision: str,
    ranks: Ranks = SINGLE_PROCESS,
) -> ClassificationScores:
    """Return the scores of a model, in training, at its end and for `pdvit eval`.

    `network` takes images `(B, 3, H, W)` to logits `(B, C)`, in evaluation mode; `batches` hold every image exactly
    once over all ranks.
    """
    for batch in batches:
        with autocast(batch.images.device, precision):
            logits = network(batch.images).float()
        metric.update(logits, batch.targets)
    return metric.compute(ranks)


@torch.no_grad()
def evaluate_segmentation(
    network: Network,
    batches: Iterable[Batch],
    metric: SegmentationMetric,
    windows: SlidingWindowConfig,
    precision: str,
    ranks: Ranks = SINGLE_PROCESS,
    in_lockstep: bool = False,
) -> SegmentationScores:
    """Return the scores of a model, in training, at its end and for `pdvit eval`.

    Masks keep their own size. `in_lockstep`: the model is sharded over the ranks (FSDP), so all of them have to make
    the same number of forward passes.
    """

    def forward(images: Tensor) -> Tensor:
        if lockstep:
            lockstep.exchange(True)
        with autocast(images.device, precision):
            return network(images)

    lockstep = _Lockstep(ranks) if in_lockstep and ranks.world_size > 1 else None
    try:
        for batch in batches:
            for image, mask in zip(batch.images, batch.targets, strict=True):
                blocks = score_rows(forward, image[None], (mask.shape[0], mask.shape[1]), metric.classes, windows)
                metric.update(blocks, mask, windows.too_large(*image.shape[-2:]))
    except UserError as error:
        if lockstep:  # the other ranks would wait for this one's next pass
            lockstep.exchange(error)
        raise
    while lockstep and lockstep.exchange(False):  # another rank still has images
        with autocast(metric.device, precision):
            network(torch.zeros(1, 3, windows.window, windows.window, device=metric.device))
    return metric.compute(ranks)


class _Lockstep:
    """Exchanges the ranks' status before each forward pass: there is one to make, there is none, or an error."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.failed = ranks, False

    def exchange(self, status: bool | UserError) -> bool:
        """Return whether any rank has a pass to make; raises the error of the first rank with one on all of them."""
        if self.failed:
            return False
        statuses = self.ranks.all_gather(status)
        for error in statuses:
            if isinstance(error, UserError):
                self.failed = True
                raise error
        return any(statuses)


def class_table(confusion: Tensor, classes: list[str], iou: Tensor | None = None) -> "pd.DataFrame":
    """Return one row per class of a confusion matrix of images, or with `iou` of pixels.

    The columns: class, images (or pixels and iou), accuracy (recall), precision, confused_with (the most frequent wrong
    prediction; of several the first) and confused (how often). A fraction of nothing is missing.
    """
    import pandas as pd

    correct, present, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    counts, indices = (found.tolist() for found in wrong.max(1))
    columns = {
        "class": classes,
        **({"images": present.tolist()} if iou is None else {"pixels": present.tolist(), "iou": _no_nan(iou)}),
        "accuracy": _no_nan(correct.double() / present),
        "precision": _no_nan(correct.double() / predicted),
        "confused_with": [classes[index] if count else None for count, index in zip(counts, indices, strict=True)],
        "confused": counts,
    }
    return pd.DataFrame(columns)


def confusion_table(confusion: Tensor, classes: list[str]) -> "pd.DataFrame":
    """Return the diagonal and the cells above zero as rows of class, predicted and images: small for many classes."""
    import pandas as pd

    kept = confusion > 0
    kept.fill_diagonal_(True)
    rows, columns = (index.tolist() for index in kept.nonzero(as_tuple=True))
    names = {"class": [classes[row] for row in rows], "predicted": [classes[column] for column in columns]}
    return pd.DataFrame(names | {"images": confusion[kept].tolist()})


def unique_names(classes: list[str]) -> list[str]:
    """Return the class names with the index appended to names that occur twice (ImageNet has two cranes)."""
    counts = Counter(classes)
    return [f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(classes)]


def csv_bytes(table: "pd.DataFrame") -> bytes:
    """Return a table as a CSV file; names of any bytes stay as they are."""
    return table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC).encode(errors="surrogateescape")


def _no_nan(values: Tensor) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]
