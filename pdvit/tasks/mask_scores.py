"""What a segmentation is measured by: one confusion matrix of pixels on the device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.data.batch import Batch
from pdvit.engine.device import autocast
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError
from pdvit.losses.cross_entropy import IGNORED
from pdvit.tasks.windows import Network, SlidingWindowConfig, score_rows


@dataclass(frozen=True)
class MaskScores:
    """How well the pixels of a split are told apart; those without a class count nowhere.

    Attributes:
        images: how many were measured.
        miou: mean of `iou` over the classes that have one.
        accuracy: share of pixels that were told right.
        accuracy_mean: mean over classes of the share of the class's pixels that were told right.
        loss: mean cross-entropy of pixels in nats; of several views, of the mean of their probabilities.
        broken: images whose scores are not all finite.
        large: images that were too large to be evaluated whole, and were in windows.
        iou: of each class `(C,)`, pixels that are it and were taken for it, among those that are or were; NaN where
            there are none. A class that was predicted and never there has 0.
        confusion: pixels by class (rows) and predicted class (columns), `(C, C)` on the CPU.
    """

    images: int
    miou: float
    accuracy: float
    accuracy_mean: float
    loss: float
    broken: int
    large: int
    iou: Tensor
    confusion: Tensor


class MaskTally:
    """Confusion matrix (integers, on the device) and loss of pixels, summed over images."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.long, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.counts = torch.zeros(3, dtype=torch.long, device=device)  # images, broken, large

    def add(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Count the pixels of some rows: scores `(C, R, W)`, mask `(R, W)`; return whether all scores are finite."""
        pairs = torch.where(mask == IGNORED, self.classes**2, mask * self.classes + scores.argmax(0))
        with _any_order():
            counts = pairs.flatten().bincount(minlength=self.classes**2 + 1)
            losses = F.cross_entropy(scores[None], mask[None], ignore_index=IGNORED, reduction="none")
        self.confusion += counts[:-1].view_as(self.confusion)
        self.loss += losses.sum(dtype=torch.float64)
        return scores.isfinite().all()

    def end_image(self, finite: Tensor, large: bool) -> None:
        """Count an image whose parts have all been added."""
        self.counts += torch.stack([torch.ones_like(finite), ~finite, torch.full_like(finite, large)])

    def scores(self, ranks: Ranks = SINGLE_PROCESS) -> MaskScores:
        """Return what the images of all processes come to; every process calls it and gets the same.

        Raises UserError where there is no pixel with a class.
        """
        confusion = ranks.all_reduce(self.confusion).cpu()
        images, broken, large = ranks.all_reduce(self.counts).tolist()
        pixels, right = confusion.sum(), confusion.diagonal().double()
        if not pixels:
            what = "no image decodes" if not images else f"none of the pixels of {images} masks has a class"
            raise UserError(what, "data.source (--data)", "see what the masks hold: --check-masks")
        of_class, taken_for = confusion.sum(1), confusion.sum(0)
        iou = right / (of_class + taken_for - right)
        return MaskScores(
            images,
            float(iou.nanmean()),
            float(right.sum() / pixels),
            float((right / of_class).nanmean()),
            float(ranks.all_reduce(self.loss) / pixels),
            broken,
            large,
            iou,
            confusion,
        )


@contextmanager
def _any_order() -> Iterator[None]:
    """Leave deterministic mode: sums of integers do not depend on their order, nor does a loss per pixel."""
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)


@torch.no_grad()
def measure_masks(
    network: Network,
    batches: Iterable[Batch],
    tally: MaskTally,
    how: SlidingWindowConfig,
    precision: str,
    ranks: Ranks = SINGLE_PROCESS,
    together: bool = False,
) -> MaskScores:
    """Run a model over images and return its scores: the one way, while training, after it and of any checkpoint.

    Args:
        network: images `(B, 3, H, W)` to logits, in evaluation mode.
        batches: every image exactly once, over all processes, with its mask at the mask's own size.
        tally: an empty one.
        how: windows, scales, flips.
        precision: of the forward passes, `fp32`, `bf16` or `fp16`.
        ranks: the processes that share the images.
        together: whether the model is spread over them, so that all have to make as many forward passes.
    """

    def logits_of(images: Tensor) -> Tensor:
        with autocast(images.device, precision):
            return network(images)

    passes = _Together(logits_of, ranks) if together and ranks.world_size > 1 else logits_of
    for batch in batches:
        for image, mask in zip(batch.images, batch.targets, strict=True):
            finite = torch.ones((), dtype=torch.bool, device=image.device)
            for top, scores in score_rows(passes, image[None], (mask.shape[0], mask.shape[1]), tally.classes, how):
                finite &= tally.add(scores, mask[top : top + scores.shape[1]])
            tally.end_image(finite, how.too_large(*image.shape[-2:]))
    if isinstance(passes, _Together):
        passes.wait(tally.loss.device, how.window)
    return tally.scores(ranks)


class _Together:
    """Forward passes that all processes make at the same time: images of different sizes need different numbers."""

    def __init__(self, network: Network, ranks: Ranks) -> None:
        self.network, self.ranks = network, ranks

    def __call__(self, images: Tensor) -> Tensor:
        self.ranks.all_gather(True)
        return self.network(images)

    def wait(self, device: torch.device, window: int) -> None:
        """Take part in what the others still have to do."""
        while any(self.ranks.all_gather(False)):
            self.network(torch.zeros(1, 3, window, window, device=device))
