"""Which batches are mixed and how: drawn from the seed and the step, so that every process draws the same."""

import random
from dataclasses import dataclass

import torch

from pdvit.data.batch import Batch
from pdvit.data.cutmix import Mixed, blend, draw_pasted, draw_shares, grid_of, partners, paste
from pdvit.data.randomness import fold


@dataclass(frozen=True)
class Mixing:
    """A share `prob` of batches is mixed: with patch-aligned CutMix or, a part of them where both are on, with Mixup.

    `cutmix` and `mixup` are the alphas of the Beta distributions, 0 is off; `labels` asks for patch targets.
    """

    cutmix: float
    prob: float
    patch_size: int
    num_classes: int
    labels: bool
    mode: str = "batch"
    mixup: float = 0.0
    switch_prob: float = 0.5
    """The share of mixed batches that CutMix takes where both are on."""

    def draws(self, seed: int, step: int) -> tuple[str | None, random.Random]:
        """Return how the batch of a step is mixed (`cutmix`, `mixup` or not at all), and the generator of the rest."""
        rng = random.Random(fold(seed, step))
        kinds = [name for name in ("cutmix", "mixup") if getattr(self, name) > 0]
        if not kinds or rng.random() >= self.prob:
            return None, rng
        return kinds[len(kinds) == 2 and rng.random() >= self.switch_prob], rng

    def held(self, seed: int, step: int, size: int, share: range) -> list[int]:
        """Return which of a step's `size` images a process needs for its share: first those that only lend."""
        if self.draws(seed, step)[0] is None:
            return list(share)
        lenders = set(partners(size, self.mode)[share.start : share.stop].tolist()) - set(share)
        return [*sorted(lenders), *share]

    def mix(self, batch: Batch, seed: int, step: int, size: int, share: range) -> Batch:
        """Mix a process's share of a step, given what it holds; label every patch where the run needs it."""
        kind, rng = self.draws(seed, step)
        if not (kind or self.labels):
            return batch
        held = torch.tensor(self.held(seed, step, size, share))
        lent = len(held) - len(share)
        own = Batch(batch.images[lent:], batch.targets[lent:], batch.index[lent:])
        source = torch.arange(lent, len(held))
        if kind:
            source = (held == partners(size, self.mode)[share.start : share.stop, None]).int().argmax(1)
        source = source.to(batch.images.device, non_blocking=True)
        mixed = self._mixed(own, batch, source, kind, rng, size, slice(share.start, share.stop))
        return Batch(mixed.images, mixed.targets, own.index, mixed.patch_targets if self.labels else None)

    def _mixed(
        self,
        own: Batch,
        held: Batch,
        source: torch.Tensor,
        kind: str | None,
        rng: random.Random,
        size: int,
        mine: slice,
    ) -> Mixed:
        """Draw for the whole batch, as every process does, and mix this one's share."""
        grid, device = grid_of(own.images.shape[-2], own.images.shape[-1], self.patch_size), own.images.device
        sources, targets = held.images[source], held.targets[source]
        if kind == "mixup":
            share = draw_shares(size, self.mixup, self.mode, rng)[mine].to(device, non_blocking=True)
            return blend(own.images, own.targets, sources, targets, share, grid, self.num_classes)
        pasted = draw_pasted(size, *grid, self.cutmix if kind else 0.0, self.mode, rng)[mine]
        pasted = pasted.to(device, non_blocking=True)
        return paste(own.images, own.targets, sources, targets, pasted, self.num_classes)
