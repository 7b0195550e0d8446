"""Metrics of a split, accumulated on the device by `update`; `compute` adds up the ranks, as in torchmetrics."""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.data.loader import Batch
from pdvit.engine.device import autocast
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError
from pdvit.losses.cross_entropy import IGNORED
from pdvit.tasks.windows import Network, SlidingWindowConfig, score_rows

if TYPE_CHECKING:
    import pandas as pd

TOP = 5
# Bins of equal width for the calibration error, open below and closed above, and their inner edges.
BINS = 15
EDGES = torch.arange(1, BINS, dtype=torch.float64) / BINS


@dataclass(frozen=True)
class Scores:
    """The metrics of a split."""

    images: int
    broken: int  # images with logits that are not finite
    # Fractions of the images (or of the pixels that have a class); `loss` is the cross-entropy without label smoothing.
    numbers: dict[str, Any]
    confusion: Tensor | None  # images (or pixels) by class (rows) and prediction, `(C, C)` on the CPU, if requested


class ClassificationMetric:
    """Accumulates the logits of images. Nothing waits for the device, and no image is kept."""

    def __init__(self, classes: int, device: torch.device, confusion: bool = False) -> None:
        self.classes, self.edges = classes, EDGES.to(device)
        self.counts = torch.zeros(4, dtype=torch.long, device=device)  # images, correct, in the top five, broken
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, correct, sum of confidences
        # int32: with 21,841 classes this is 1.9 GB
        self.confusion = torch.zeros(classes**2, dtype=torch.int32, device=device) if confusion else None

    def update(self, network: Network, batch: Batch) -> None:
        """Add a batch of images with a class each; the network returns logits `(B, C)`."""
        logits, targets = network(batch.images).float(), batch.targets
        predicted = logits.argmax(1)
        correct = predicted == targets
        in_top = (logits.topk(min(TOP, self.classes)).indices == targets[:, None]).any(1)
        broken = ~logits.isfinite().all(1)
        self.counts += torch.stack([torch.ones_like(correct), correct, in_top, broken]).sum(1)
        self.loss += F.cross_entropy(logits, targets, reduction="sum").double()
        confidence = logits.softmax(1).amax(1).double()
        inside = F.one_hot(torch.bucketize(confidence, self.edges), BINS).double()
        self.bins += torch.stack([torch.ones_like(confidence), correct.double(), confidence]) @ inside
        if self.confusion is not None:
            ones = torch.ones_like(targets, dtype=torch.int32)
            self.confusion.index_add_(0, targets * self.classes + predicted, ones)

    def compute(self, ranks: Ranks = SINGLE_PROCESS) -> Scores:
        """Return the metrics over the images of all ranks, on each rank; raises UserError if there are no images."""
        images, correct, in_top, broken = ranks.all_reduce(self.counts).tolist()
        if not images:
            raise UserError("none of the images decodes", "data.source (--data)", "replace them, or take another split")
        # Guo et al. 2017 (arXiv 1706.04599), equation 3: the mean over images of |accuracy - confidence| of their bin
        filled, right, confidence = ranks.all_reduce(self.bins)
        numbers = {
            "accuracy": correct / images,
            "accuracy_top5": in_top / images if self.classes >= TOP else None,
            "loss": float(ranks.all_reduce(self.loss)) / images,
            "calibration_error": float((right - confidence).abs().sum() / filled.sum()),
        }
        confusion = None if self.confusion is None else ranks.all_reduce(self.confusion).view(self.classes, -1).cpu()
        return Scores(images, broken, numbers, confusion)


class SegmentationMetric:
    """Accumulates the confusion matrix of pixels (integers, on the device) and their loss."""

    def __init__(self, classes: int, windows: SlidingWindowConfig, device: torch.device) -> None:
        self.classes, self.windows = classes, windows
        self.confusion = torch.zeros(classes, classes, dtype=torch.long, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.counts = torch.zeros(3, dtype=torch.long, device=device)  # images, broken, in windows

    def update(self, network: Network, batch: Batch) -> None:
        """Add images with masks, which keep their own size; the network returns logits of the images' pixels."""
        for image, mask in zip(batch.images, batch.targets, strict=True):
            finite, large = torch.ones((), dtype=torch.bool, device=mask.device), False
            size = (mask.shape[0], mask.shape[1])
            for top, scores, in_windows in score_rows(network, image[None], size, self.classes, self.windows):
                rows = mask[top : top + scores.shape[1]]
                pairs = torch.where(rows == IGNORED, self.classes**2, rows * self.classes + scores.argmax(0))
                self.confusion += pairs.flatten().bincount(minlength=self.classes**2 + 1)[:-1].view_as(self.confusion)
                # `cross_entropy` gives the same numbers, but has no deterministic kernel for pixels on a GPU
                losses = -scores.log_softmax(0).gather(0, rows.clamp(max=self.classes - 1)[None])[0]
                self.loss += losses.masked_fill(rows == IGNORED, 0).sum(dtype=torch.float64)
                finite &= scores.isfinite().all()
                large |= in_windows
            self.counts += torch.stack([torch.ones_like(finite), ~finite, torch.full_like(finite, large)])

    def compute(self, ranks: Ranks = SINGLE_PROCESS) -> Scores:
        """Return the metrics over the images of all ranks, on each rank; raises UserError if no pixel has a class."""
        confusion = ranks.all_reduce(self.confusion).cpu()
        images, broken, in_windows = ranks.all_reduce(self.counts).tolist()
        pixels, correct = confusion.sum(), confusion.diagonal().double()
        if not pixels:
            what = "no image decodes" if not images else f"none of the pixels of {images} masks has a class"
            raise UserError(what, "data.source (--data)", "check the masks: --check-masks")
        numbers = {
            "miou": float(class_iou(confusion).nanmean()),
            "accuracy": float(correct.sum() / pixels),
            "accuracy_mean": float((correct / confusion.sum(1)).nanmean()),
            "loss": float(ranks.all_reduce(self.loss) / pixels),
        }
        return Scores(images, broken, numbers | ({"in_windows": in_windows} if in_windows else {}), confusion)


def class_iou(confusion: Tensor) -> Tensor:
    """Return intersection over union of each class `(C,)`; NaN if it is neither present nor predicted."""
    correct = confusion.diagonal().double()
    return correct / (confusion.sum(1) + confusion.sum(0) - correct)


Metric = ClassificationMetric | SegmentationMetric


@torch.no_grad()
def evaluate(
    network: Network,
    batches: Iterable[Batch],
    metric: Metric,
    precision: str,
    ranks: Ranks = SINGLE_PROCESS,
    sharded_side: int | None = None,
) -> Scores:
    """Return the scores of a network; over all ranks, `batches` hold each image once.

    `sharded_side` is set if the model is sharded over the ranks (FSDP), so that all have to make the same number of
    forward passes: the side of an image for the passes of a rank that has none left.
    """
    passes: Network = autocast(metric.counts.device, precision)(network)
    exchanged = False  # whether an error is that of all ranks

    def exchange(status: bool | UserError) -> bool:
        """Exchange whether there is a pass to make, or an error that all raise; return whether any rank has a pass."""
        nonlocal exchanged
        exchanged = True
        found = any(ranks.exchange(status))
        exchanged = False
        return found

    def pass_in_lockstep(images: Tensor) -> Tensor:
        exchange(True)
        return passes(images)

    if sharded_side is None:
        with ranks.interruptible():
            for batch in batches:
                metric.update(passes, batch)
        return metric.compute(ranks)
    try:
        for batch in batches:
            metric.update(pass_in_lockstep, batch)
    except UserError as error:
        if not exchanged:  # the other ranks would wait for this one's next pass
            exchange(error)
        raise
    while exchange(False):  # another rank still has images
        passes(torch.zeros(1, 3, sharded_side, sharded_side, device=metric.counts.device))
    return metric.compute(ranks)


def class_table(confusion: Tensor, classes: list[str], pixels: bool = False) -> "pd.DataFrame":
    """Return one row per class of a confusion matrix of images, or of pixels.

    The columns: class, images (or pixels and iou), accuracy (recall), precision, confused_with (the most frequent wrong
    prediction; of several the first) and confused (how often). A fraction of nothing is missing.
    """
    import pandas as pd

    correct, present, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    counts, indices = (found.tolist() for found in (confusion - correct.diag()).max(1))
    columns: dict[str, Any] = {"class": classes, "pixels" if pixels else "images": present.tolist()}
    columns |= {"iou": class_iou(confusion).tolist()} if pixels else {}
    columns |= {"accuracy": (correct.double() / present).tolist(), "precision": (correct.double() / predicted).tolist()}
    columns["confused_with"] = [classes[at] if count else None for count, at in zip(counts, indices, strict=True)]
    return pd.DataFrame(columns | {"confused": counts})


def confusion_table(confusion: Tensor, classes: list[str]) -> "pd.DataFrame":
    """Return the diagonal and the cells above zero as rows of class, predicted and images: small for many classes."""
    import pandas as pd

    kept = (confusion > 0).fill_diagonal_(True)
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
