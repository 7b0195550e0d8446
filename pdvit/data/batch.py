"""What a training step receives, from the worker loader and from a resident set alike."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Attributes:
        images: normalised `(B, 3, H, W)`, float32.
        targets: class indices `(B,)` or, after mixing, probabilities `(B, C)`; in segmentation the class of every pixel
            `(B, H, W)`, 255 where none counts.
        index: which samples of the split, `(B,)`, for replay; -1 for one that only fills a turn.
        patch_targets: class of every patch `(B, N)`; None where the run has no patch labels.
        weights: factors on the weights of the terms in this step, `(B, T)`, each row the same (so that a batch can be
            divided like its images); None where no weight has a schedule.
        replaced: which images stand in for ones that do not decode, `(B,)`; None where such images end the run.
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
        """Return what is set, by name."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def repeat(self, size: int) -> "Batch":
        """Return a batch of `size` images, its own over and over."""
        again = torch.arange(size, device=self.images.device) % len(self)
        return Batch(**{name: value[again.to(value.device)] for name, value in self.tensors().items()})

    def split(self, size: int) -> list["Batch"]:
        """Divide it into parts of `size` images; the last may be shorter."""
        if size >= len(self):
            return [self]
        parts = {name: value.split(size) for name, value in self.tensors().items()}
        return [Batch(**dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]
