"""CutMix of whole patches, so that each has one label, and Mixup; drawn from seed and step, alike on all ranks."""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.config.schema import AugmentConfig
from pdvit.data.randomness import fold
from pdvit.errors import UserError

# Number of images with the same rectangle or Mixup fraction; None: all of a batch.
MODES = {"batch": None, "pair": 2, "elem": 1}
WHERE = "patch_cutmix(images, targets, ...)"


class Mixed(NamedTuple):
    """Images `(B, C, H, W)`, soft class targets `(B, classes)` and patch targets, row by row of the grid.

    Patch targets are indices `(B, N)`; after Mixup, or with several labels per image, they are `(B, N, classes)`.
    """

    images: Tensor
    targets: Tensor
    patch_targets: Tensor


def patch_cutmix(
    images: Tensor,
    targets: Tensor,
    patch_size: int,
    num_classes: int,
    alpha: float = 1.0,
    rng: random.Random | None = None,
    mode: str = "batch",
) -> Mixed:
    """Paste a rectangle of patches from another image of the batch into each.

    Args:
        images: `(B, C, H, W)`, any dtype; H and W are multiples of `patch_size`.
        targets: class indices `(B,)`; or, where an image can have several labels, numbers `(B, num_classes)`.
        patch_size: side of a patch in pixels.
        num_classes: length of the soft class targets.
        alpha: the fraction of the pasted area is drawn from Beta(alpha, alpha), then rounded to whole patches so that
            both images stay present; 0 pastes nothing, and every patch has the class of its image.
        rng: the generator; unset: seeded by Python's own, so `random.seed` decides.
        mode: `batch`: one rectangle, from the image before; `elem`: a rectangle for each image, from the image before;
            `pair`: two neighbouring images swap a rectangle (the last of an odd number stays unchanged).

    Returns the mixed images, class targets weighted by area, and the exact class of every patch. Raises UserError for
    invalid arguments; for a target that is no class, torch raises.
    """
    if images.ndim != 4 or tuple(targets.shape) not in ((len(images),), (len(images), num_classes)):
        what = f"images of shape {tuple(images.shape)} with targets of shape {tuple(targets.shape)}"
        tip = f"pass images (B, C, H, W) and one class index for each, (B,), or labels (B, {num_classes})"
        raise UserError(what, WHERE, tip)
    if not 0 <= alpha < math.inf:
        raise UserError(f"alpha is {alpha}", WHERE, "choose a number from 0 (off) upwards")
    if mode not in MODES:
        raise UserError(f"there is no mode '{mode}'", WHERE, f"choose one of {', '.join(MODES)}")
    rng = rng or random.Random(random.getrandbits(64))
    rows, columns = grid_of(images.shape[-2], images.shape[-1], patch_size)
    pasted = draw_pasted(len(images), rows, columns, alpha, mode, rng).to(images.device, non_blocking=True)
    partner = partners(len(images), mode).to(images.device, non_blocking=True)
    return paste(images, targets, images[partner], targets[partner], pasted, num_classes)


@dataclass(frozen=True)
class Mixing:
    """Mixes batches with patch-aligned CutMix or Mixup, as configured."""

    config: AugmentConfig
    patch_size: int
    num_classes: int
    labels: bool  # whether patch targets are needed

    def draws(self, seed: int, step: int) -> tuple[str | None, random.Random]:
        """Return the method of the batch of a step (`cutmix`, `mixup` or None), and the generator of further draws."""
        rng, config = random.Random(fold(seed, step)), self.config
        methods = [name for name in ("cutmix", "mixup") if getattr(config, name)]
        if not methods or rng.random() >= config.mixup_prob:
            return None, rng
        return methods[len(methods) == 2 and rng.random() >= config.mixup_switch_prob], rng

    def held(self, seed: int, step: int, size: int, part: range) -> list[int]:
        """Return which of a step's `size` images a rank needs for its `part`: first those that are only mixed in."""
        if self.draws(seed, step)[0] is None:
            return list(part)
        sources = set(partners(size, self.config.mixup_mode)[part.start : part.stop].tolist()) - set(part)
        return [*sorted(sources), *part]

    def mix(
        self, images: Tensor, targets: Tensor, seed: int, step: int, size: int, part: range
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix a rank's part of a step, given the images of `held` with their targets, and label patches if needed."""
        (method, rng), mode = self.draws(seed, step), self.config.mixup_mode
        own, own_targets = (tensor[len(images) - len(part) :] for tensor in (images, targets))
        if not (method or self.labels):
            return own, own_targets, None
        height, width = images.shape[-2:]
        held, mine = torch.tensor(self.held(seed, step, size, part)), slice(part.start, part.stop)
        source = (held == partners(size, mode)[mine, None]).int().argmax(1).to(images.device, non_blocking=True)
        # every rank draws for the whole batch, and mixes its own part
        if method == "mixup":
            group, alpha = MODES[mode] or size, self.config.mixup
            drawn = torch.tensor([rng.betavariate(alpha, alpha) for _ in range(-(-size // group))])
            fraction = drawn.repeat_interleave(group)[mine, None].to(images.device, non_blocking=True)
            soft, weight = _soft(own_targets, targets[source], fraction, self.num_classes), fraction[..., None, None]
            blended = (1 - weight) * own + weight * images[source]
            patches = math.prod(grid_of(height, width, self.patch_size)) if self.labels else 1
            mixed = Mixed(blended, soft, soft[:, None].expand(-1, patches, -1))
        else:
            grid = grid_of(height, width, self.patch_size)
            alpha = (self.config.cutmix or 0.0) if method else 0.0
            pasted = draw_pasted(size, *grid, alpha, mode, rng)[mine]
            pasted = pasted.to(images.device, non_blocking=True)
            mixed = paste(own, own_targets, images[source], targets[source], pasted, self.num_classes)
        return mixed if self.labels else (mixed.images, mixed.targets, None)


def partners(count: int, mode: str) -> Tensor:
    """Return the index of the image that each image of a batch is mixed with, `(count,)`."""
    each = torch.arange(count)
    if mode != "pair":
        return each.roll(1)
    other = each ^ 1
    return torch.where(other < count, other, each)


def draw_pasted(count: int, rows: int, columns: int, alpha: float, mode: str, rng: random.Random) -> Tensor:
    """Draw which patches of each image are pasted, `(count, rows, columns)`.

    They form a rectangle, whose fraction of the grid follows Beta(alpha, alpha): at least a patch, and at most all but
    one row or column (nothing in a grid of one patch).
    """
    group = MODES[mode] or max(1, count)
    drawn = torch.zeros(-(-count // group), rows, columns, dtype=torch.bool)
    for pasted in drawn if alpha > 0 else ():
        side = math.sqrt(rng.betavariate(alpha, alpha))
        tall, wide = max(1, round(rows * side)), max(1, round(columns * side))
        if (tall, wide) == (rows, columns):
            by_row = rows > columns or (rows == columns and rng.random() < 0.5)
            tall, wide = tall - by_row, wide - (not by_row)
        top, left = rng.randint(0, rows - tall), rng.randint(0, columns - wide)
        pasted[top : top + tall, left : left + wide] = True
    return drawn.repeat_interleave(group, 0)[:count]


def paste(images: Tensor, targets: Tensor, sources: Tensor, partner: Tensor, pasted: Tensor, num_classes: int) -> Mixed:
    """Paste the patches `pasted` `(B, rows, columns)` of `sources`, whose targets are `partner`, into the images."""
    rows, columns = pasted.shape[1:]
    tall, wide = images.shape[-2] // rows, images.shape[-1] // columns
    pixels = pasted.repeat_interleave(tall, 1).repeat_interleave(wide, 2)
    images = torch.where(pixels[:, None], sources, images)
    fraction = pasted.flatten(1).float().mean(1, keepdim=True)
    patches = pasted.flatten(1) if targets.ndim == 1 else pasted.flatten(1)[..., None]
    patch_targets = torch.where(patches, partner[:, None], targets[:, None])
    return Mixed(images, _soft(targets, partner, fraction, num_classes), patch_targets)


def _soft(targets: Tensor, partner: Tensor, fraction: Tensor, num_classes: int) -> Tensor:
    if targets.ndim == 1:
        targets, partner = F.one_hot(targets, num_classes), F.one_hot(partner, num_classes)
    return ((1 - fraction) * targets + fraction * partner).to(torch.float32)


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Return rows and columns of the patch grid; raises UserError if patches do not fit."""
    if height % patch_size or width % patch_size:
        what = f"patches of {patch_size} pixels do not fit images of {height}x{width}"
        tip = f"choose a multiple of {patch_size} as image size, or leave out CutMix and mixing (--cutmix 0 --mixing 0)"
        raise UserError(what, "data.img_size and model.patch_size", tip)
    return height // patch_size, width // patch_size
