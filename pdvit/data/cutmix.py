"""CutMix of whole patches, which gives every patch exactly one label, and Mixup."""

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError

MODES = ("batch", "pair", "elem")


class Mixed(NamedTuple):
    """Images `(B, C, H, W)`, soft class targets `(B, classes)` and patch targets, row by row of the grid.

    Patch targets are indices `(B, N)`; after Mixup, or with several labels per image, they are `(B, N, classes)`.
    """

    images: Tensor
    targets: Tensor
    patch_targets: Tensor


class Box(NamedTuple):
    """A rectangle on the patch grid: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


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
        alpha: the fraction of the pasted area is drawn from Beta(alpha, alpha), then rounded to whole patches; 0 pastes
            nothing, and every patch has the class of its image.
        rng: the generator; unset: seeded by Python's own, so `random.seed` decides.
        mode: `batch`: one rectangle, from the image before; `elem`: a rectangle for each image, from the image before;
            `pair`: two neighbouring images swap a rectangle (the last of an odd number stays unchanged).

    Returns:
        The mixed images, class targets weighted by area, and the exact class of every patch.

    Raises:
        UserError: the patch size does not divide the images, there is not one target for each image, a target is not
            a class (on a GPU torch itself raises), alpha is negative or not a number, or there is no such mode.
    """
    _check_targets(images, targets, num_classes)
    if not 0 <= alpha < math.inf:
        raise UserError(f"alpha is {alpha}", "augment.cutmix (--cutmix)", "choose a number from 0 (off) upwards")
    if mode not in MODES:
        raise UserError(f"there is no mode '{mode}'", "patch_cutmix(mode=...)", f"choose one of {', '.join(MODES)}")
    rng = rng or random.Random(random.getrandbits(64))
    rows, columns = grid_of(images.shape[-2], images.shape[-1], patch_size)
    pasted = draw_pasted(len(images), rows, columns, alpha, mode, rng).to(images.device, non_blocking=True)
    partner = partners(len(images), mode).to(images.device, non_blocking=True)
    return paste(images, targets, images[partner], targets[partner], pasted, num_classes)


def partners(count: int, mode: str) -> Tensor:
    """Return the index of the image that each image of a batch is mixed with, `(count,)`."""
    each = torch.arange(count)
    if mode != "pair":
        return each.roll(1)
    other = each ^ 1
    return torch.where(other < count, other, each)


def draw_pasted(count: int, rows: int, columns: int, alpha: float, mode: str, rng: random.Random) -> Tensor:
    """Draw which patches of each image are pasted, `(count, rows, columns)`."""
    pasted = torch.zeros(_draws(count, mode), rows, columns, dtype=torch.bool)
    for each in pasted if alpha > 0 else ():
        box = draw_box(rows, columns, alpha, rng)
        each[box.top : box.bottom, box.left : box.right] = True
    return _for_each(pasted, count, mode)


def draw_fractions(count: int, alpha: float, mode: str, rng: random.Random) -> Tensor:
    """Draw the fraction that Mixup takes from the partner of each image, `(count,)`, from Beta(alpha, alpha)."""
    return _for_each(torch.tensor([rng.betavariate(alpha, alpha) for _ in range(_draws(count, mode))]), count, mode)


def _draws(count: int, mode: str) -> int:
    return {"batch": 1, "pair": (count + 1) // 2, "elem": count}[mode]


def _for_each(drawn: Tensor, count: int, mode: str) -> Tensor:
    return drawn.repeat_interleave({"batch": count, "pair": 2, "elem": 1}[mode], 0)[:count]


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


def blend(
    images: Tensor,
    targets: Tensor,
    sources: Tensor,
    partner: Tensor,
    fraction: Tensor,
    grid: tuple[int, int],
    num_classes: int,
) -> Mixed:
    """Mix each image with a source, pixel by pixel (Mixup, arXiv 1710.09412); every patch has the image's soft target.

    `fraction` `(B,)` is that of the source. timm's Mixup draws from numpy's generator and takes partners from the far
    end of the batch, so several ranks could not mix a shared batch alike.
    """
    fraction = fraction[:, None].to(images.dtype)
    soft = _soft(targets, partner, fraction, num_classes)
    weight = fraction[..., None, None]
    images = (1 - weight) * images + weight * sources
    return Mixed(images, soft, soft[:, None].expand(-1, grid[0] * grid[1], -1))


def _soft(targets: Tensor, partner: Tensor, fraction: Tensor, num_classes: int) -> Tensor:
    if targets.ndim == 1:
        targets, partner = F.one_hot(targets, num_classes), F.one_hot(partner, num_classes)
    return ((1 - fraction) * targets + fraction * partner).to(torch.float32)


def _check_targets(images: Tensor, targets: Tensor, num_classes: int) -> None:
    if images.ndim != 4 or tuple(targets.shape) not in ((len(images),), (len(images), num_classes)):
        raise UserError(
            f"images of shape {tuple(images.shape)} with targets of shape {tuple(targets.shape)}",
            "patch_cutmix(images, targets, ...)",
            f"pass images (B, C, H, W) and one class index for each, (B,), or labels (B, {num_classes})",
        )
    if targets.device.type != "cpu" or not len(targets):  # on a GPU the check would synchronise
        return
    low, high = float(targets.min()), float(targets.max())
    if targets.ndim == 1 and not 0 <= low <= high < num_classes:
        raise UserError(
            f"targets from {low:g} to {high:g} for {num_classes} classes",
            "patch_cutmix(images, targets, ...)",
            "number the classes from 0 to num_classes - 1",
        )


def draw_box(rows: int, columns: int, alpha: float, rng: random.Random) -> Box:
    """Draw a rectangle whose fraction of the grid follows Beta(alpha, alpha), rounded to whole patches."""
    side = math.sqrt(rng.betavariate(alpha, alpha))
    tall, wide = round(rows * side), round(columns * side)
    top, left = rng.randint(0, rows - tall), rng.randint(0, columns - wide)
    return Box(top, top + tall, left, left + wide)


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Return rows and columns of the patch grid; raises UserError if patches do not fit."""
    if height % patch_size or width % patch_size:
        raise UserError(
            f"patches of {patch_size} pixels do not fit images of {height}x{width}",
            "data.img_size and model.patch_size",
            f"choose an image size that is a multiple of {patch_size}, for example "
            f"{max(1, round(height / patch_size)) * patch_size}",
        )
    return height // patch_size, width // patch_size
