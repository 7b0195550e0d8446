"""What a training step receives, from the worker loader and from a resident set alike."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Attributes:
        images: normalised `(B, 3, H, W)`, float32.
        targets: class indices `(B,)` or, after mixing, probabilities `(B, C)`.
        index: which samples of the split, `(B,)`, for replay.
        patch_targets: class of every patch `(B, N)`; None where the run has no patch labels.
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    patch_targets: Tensor | None = None
