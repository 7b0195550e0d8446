"""A batch, from worker processes and from a resident set alike."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Attributes:
        images: normalised `(B, 3, H, W)`, float32.
        targets: class indices `(B,)` or, after mixing, probabilities `(B, C)`; in segmentation the class of every pixel
            `(B, H, W)`, 255 if it has none.
        index: sample indices in the split, `(B,)`.
        patch_targets: class of every patch `(B, N)`; None without patch labels.
        weights: factors on the weights of the terms in this step, `(B, T)`, with equal rows, so that they split like
            the images; None without schedules.
        replaced: whether an image replaces one that does not decode, `(B,)`; None if such images are errors.
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    patch_targets: Tensor | None = None
    weights: Tensor | None = None
    replaced: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are set, by name."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) is not None}

    def repeat(self, size: int) -> "Batch":
        """Return a batch of `size` images, a repetition of its own."""
        again = torch.arange(size, device=self.images.device) % len(self)
        return Batch(**{name: value[again.to(value.device)] for name, value in self.tensors().items()})

    def split(self, size: int) -> list["Batch"]:
        """Split into batches of `size` images; the last may be smaller."""
        if size >= len(self):
            return [self]
        parts = {name: value.split(size) for name, value in self.tensors().items()}
        return [Batch(**dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]
