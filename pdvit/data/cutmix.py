"""Patch-aligned CutMix: a rectangle of whole patches comes from another image, so every patch has exactly one label."""

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError


class Mixed(NamedTuple):
    """Images `(B, C, H, W)`, soft class targets `(B, classes)` and patch targets `(B, N)`, row by row of the grid."""

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
) -> Mixed:
    """Paste one rectangle of patches from each image's neighbour in the batch into it.

    Args:
        images: `(B, C, H, W)`, any dtype; H and W are multiples of `patch_size`.
        targets: class indices `(B,)`.
        patch_size: side of a patch in pixels.
        num_classes: length of the soft class targets.
        alpha: the share of the pasted area is drawn from Beta(alpha, alpha), then rounded to whole patches; 0 pastes
            nothing, and every patch has the class of its image.
        rng: where draws come from; unset: Python's own generator, so `random.seed` decides.

    Returns:
        The mixed images (those passed in where nothing is pasted), class targets weighted by area, and the exact class
        of every patch.

    Raises:
        UserError: the patch size does not divide the images, there is not one target for each image, a target is not
            a class (on a GPU torch itself says so), or alpha is negative or not a number.
    """
    _check_targets(images, targets, num_classes)
    if not 0 <= alpha < math.inf:
        raise UserError(f"alpha is {alpha}", "augment.cutmix (--cutmix)", "choose a number from 0 (off) upwards")
    rng = rng or random.Random(random.getrandbits(64))
    return mix_with(images, targets, images.roll(1, 0), targets.roll(1, 0), patch_size, num_classes, alpha, rng)


def mix_with(
    images: Tensor,
    targets: Tensor,
    sources: Tensor,
    partner: Tensor,
    patch_size: int,
    num_classes: int,
    alpha: float,
    rng: random.Random,
) -> Mixed:
    """Paste one rectangle of `sources` `(B, C, H, W)`, of the classes `partner` `(B,)`, into the images."""
    rows, columns = grid_of(images.shape[-2], images.shape[-1], patch_size)
    box = draw_box(rows, columns, alpha, rng) if alpha > 0 else Box(0, 0, 0, 0)
    area = (box.bottom - box.top) * (box.right - box.left)
    patch_targets = targets[:, None, None].repeat(1, rows, columns)
    patch_targets[:, box.top : box.bottom, box.left : box.right] = partner[:, None, None]
    if area:
        top, bottom, left, right = (edge * patch_size for edge in box)
        images = images.clone()
        images[..., top:bottom, left:right] = sources[..., top:bottom, left:right]
    share = area / (rows * columns)
    soft = (1 - share) * F.one_hot(targets, num_classes) + share * F.one_hot(partner, num_classes)
    return Mixed(images, soft.to(torch.float32), patch_targets.flatten(1))


def _check_targets(images: Tensor, targets: Tensor, num_classes: int) -> None:
    if images.ndim != 4 or targets.shape != images.shape[:1]:
        raise UserError(
            f"images of shape {tuple(images.shape)} with targets of shape {tuple(targets.shape)}",
            "patch_cutmix(images, targets, ...)",
            "pass images (B, C, H, W) and one class index for each, (B,)",
        )
    # a GPU would have to be waited for
    if (
        targets.device.type == "cpu"
        and len(targets)
        and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes
    ):
        raise UserError(
            f"targets from {int(targets.min())} to {int(targets.max())} for {num_classes} classes",
            "patch_cutmix(images, targets, ...)",
            "number the classes from 0 to num_classes - 1",
        )


def draw_box(rows: int, columns: int, alpha: float, rng: random.Random) -> Box:
    """Draw a rectangle whose share of the grid follows Beta(alpha, alpha), as near as whole patches allow."""
    side = math.sqrt(rng.betavariate(alpha, alpha))
    tall, wide = round(rows * side), round(columns * side)
    top, left = rng.randint(0, rows - tall), rng.randint(0, columns - wide)
    return Box(top, top + tall, left, left + wide)


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Return rows and columns of the patch grid; UserError where patches do not fit."""
    if height % patch_size or width % patch_size:
        raise UserError(
            f"patches of {patch_size} pixels do not fit images of {height}x{width}",
            "data.img_size and model.patch_size",
            f"choose an image size that is a multiple of {patch_size}, for example "
            f"{max(1, round(height / patch_size)) * patch_size}",
        )
    return height // patch_size, width // patch_size
