"""CutMix and Mixup of batches, drawn from seed and step, so that all ranks draw the same."""

import random
from dataclasses import dataclass

import torch

from pdvit.data.batch import Batch
from pdvit.data.cutmix import blend, draw_fractions, draw_pasted, grid_of, partners, paste
from pdvit.data.randomness import fold


@dataclass(frozen=True)
class Mixing:
    """Mixes a fraction `prob` of batches with patch-aligned CutMix or Mixup.

    Attributes:
        cutmix, mixup: alphas of the Beta distributions, 0 is off.
        labels: whether patch targets are needed.
        switch_prob: fraction of the mixed batches that CutMix takes if both are on.
    """

    cutmix: float
    prob: float
    patch_size: int
    num_classes: int
    labels: bool
    mode: str = "batch"
    mixup: float = 0.0
    switch_prob: float = 0.5

    def draws(self, seed: int, step: int) -> tuple[str | None, random.Random]:
        """Return the method of the batch of a step (`cutmix`, `mixup` or None), and the generator of further draws."""
        rng = random.Random(fold(seed, step))
        methods = [name for name in ("cutmix", "mixup") if getattr(self, name) > 0]
        if not methods or rng.random() >= self.prob:
            return None, rng
        return methods[len(methods) == 2 and rng.random() >= self.switch_prob], rng

    def held(self, seed: int, step: int, size: int, part: range) -> list[int]:
        """Return which of a step's `size` images a rank needs for its `part`: first those that are only mixed in."""
        if self.draws(seed, step)[0] is None:
            return list(part)
        sources = set(partners(size, self.mode)[part.start : part.stop].tolist()) - set(part)
        return [*sorted(sources), *part]

    def mix(self, batch: Batch, seed: int, step: int, size: int, part: range) -> Batch:
        """Mix a rank's part of a step, given the images of `held`, and label every patch if needed."""
        method, rng = self.draws(seed, step)
        if not (method or self.labels):
            return batch
        held = torch.tensor(self.held(seed, step, size, part))
        extra, mine = len(held) - len(part), slice(part.start, part.stop)
        own = Batch(batch.images[extra:], batch.targets[extra:], batch.index[extra:])
        source = torch.arange(extra, len(held))
        if method:
            source = (held == partners(size, self.mode)[mine, None]).int().argmax(1)
        device = batch.images.device
        source = source.to(device, non_blocking=True)
        pair = own.images, own.targets, batch.images[source], batch.targets[source]
        grid = grid_of(own.images.shape[-2], own.images.shape[-1], self.patch_size)
        # every rank draws for the whole batch, and mixes its own part
        if method == "mixup":
            fraction = draw_fractions(size, self.mixup, self.mode, rng)[mine].to(device, non_blocking=True)
            mixed = blend(*pair, fraction, grid, self.num_classes)
        else:
            pasted = draw_pasted(size, *grid, self.cutmix if method else 0.0, self.mode, rng)[mine]
            mixed = paste(*pair, pasted.to(device, non_blocking=True), self.num_classes)
        return Batch(mixed.images, mixed.targets, own.index, mixed.patch_targets if self.labels else None)
