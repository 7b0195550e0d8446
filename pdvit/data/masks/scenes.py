"""Digit scenes: real handwritten digits on textured grounds, and which digit every pixel belongs to.

A scene is a function of its split and its number alone. It is made of whole numbers (Pillow resamples bytes with them
too), so it is the same on every machine.
"""

from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.masks.split import MaskSplit
from pdvit.data.masks.table import Array, default_palette
from pdvit.data.randomness import fold, uniform
from pdvit.data.sources import ArraySplit, Source
from pdvit.data.sources.digits import read_digits

SIDE = 64
GROUND = 10
CLASSES = [*map(str, range(10)), "ground"]
COUNTS = {"train": 4096, "val": 128, "test": 256}
# Least and most digits that are laid into a scene, sides of a digit in pixels, and what its place is a multiple of: on
# a grid a small model learns more in two minutes.
DIGITS, SIDES, GRID = (3, 4), (28, 32, 36), 8
# Levels of red, green and blue: of ink, and least and most of the ground.
LIGHT, DARK = (200, 255), (20, 155)
# Ink that makes a pixel a digit's, and the share of a digit's pixels that may lie on others; else it is laid anew.
INK, COVERED, TRIES = 64, 0.1, 6
# Scenes whose pixels are hashed.
HASHED = 4


def read_scenes(data: DataConfig) -> Source:
    """Return scenes of the digits of each split of pdvit's digits: no digit is in two splits."""
    digits = read_digits(DataConfig(split_seed=data.split_seed)).splits
    splits = {}
    for number, (name, count) in enumerate(COUNTS.items()):
        split = digits[name]
        assert isinstance(split, ArraySplit)
        splits[name] = Scenes(split.images[:, 0], split.labels, name, number, torch.arange(count))
    palette = default_palette(len(CLASSES) + 1)[1:-1]
    return Source("scenes", CLASSES, splits, palette=[*palette, (0, 0, 0)])


@dataclass(frozen=True)
class Scenes(MaskSplit):
    """Scenes of 64x64 pixels, made when they are needed, from digits `(D, 32, 32)` uint8 with their values `(D,)`."""

    digits: Tensor
    values: Tensor
    role: str
    stream: int
    numbers: Tensor
    """Which of its scenes these are."""
    made: dict[int, tuple[Array, Array]] = field(default_factory=dict, repr=False, compare=False)
    """Those that this process has made."""

    flip = 0.0  # a mirrored digit is another sign

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        """Each image's own number, `(N,)`."""
        return torch.arange(len(self.numbers))

    def open(self, index: int) -> Image.Image:
        """Return a scene."""
        return Image.fromarray(self.scene(index)[0])

    def mask(self, index: int) -> Tensor:
        """Return the digit of every pixel, 10 where there is none."""
        return torch.from_numpy(self.scene(index)[1])

    def name(self, index: int) -> str:
        """Return the name of a scene."""
        return f"scene {self.numbers[index]} of {self.role}"

    mask_name = key = name

    def take(self, chosen: Tensor) -> "Scenes":
        """Return the scenes at these indices."""
        return Scenes(self.digits, self.values, self.role, self.stream, self.numbers[chosen])

    def hash(self) -> str:
        """Return what tells these scenes from others: their numbers, the digits, and the pixels of a few."""
        digest = sha256(self.numbers.numpy().tobytes() + self.digits.numpy().tobytes() + self.values.numpy().tobytes())
        for index in range(min(HASHED, len(self))):
            digest.update(b"".join(part.tobytes() for part in self.scene(index)))
        return digest.hexdigest()[:16]

    def scene(self, index: int) -> tuple[Array, Array]:
        """Make a scene, or find it made: pixels `(64, 64, 3)` and digits `(64, 64)`, uint8."""
        number = int(self.numbers[index])
        if number not in self.made:
            self.made[number] = self._make(fold(self.stream, number))
        return self.made[number]

    def _make(self, seed: int) -> tuple[Array, Array]:
        pixels, mask = _ground(seed), np.full((SIDE, SIDE), GROUND, np.uint8)
        draws = uniform(seed, torch.arange(DIGITS[1] * TRIES + 1), 7).tolist()
        wanted, *_ = draws.pop()
        for place in range(_between(DIGITS, wanted)):
            for which, side, down, right, *colour in draws[place * TRIES : (place + 1) * TRIES]:
                number, length = int(which * len(self.values)), SIDES[int(side * len(SIDES))]
                ink = _ink(self.digits[number].numpy(), length)
                top, left = (int(part * ((SIDE - length) // GRID + 1)) * GRID for part in (down, right))
                box, stroke = (slice(top, top + length), slice(left, left + length)), ink >= INK
                if (mask[box][stroke] != GROUND).mean() <= COVERED:
                    mask[box][stroke] = int(self.values[number])
                    _paint(pixels[box], ink, np.array([_between(LIGHT, part) for part in colour]))
                    break
        return pixels, mask


def _between(ends: tuple[int, int], draw: float) -> int:
    """Return a whole number from least to most, from a draw in [0, 1)."""
    return ends[0] + int(draw * (ends[1] - ends[0] + 1))


def _ground(seed: int) -> Array:
    """Return a ground of blotches of colour, large and small, and grain: `(64, 64, 3)` uint8."""
    total = np.zeros((SIDE, SIDE, 3), np.int32)
    for stream, (cells, strength) in enumerate(((4, 80), (13, 40), (SIDE, 15))):
        draws = uniform(fold(seed, stream), torch.arange(cells * cells), 3).numpy().reshape(cells, cells, 3)
        blotches = Image.fromarray((draws * strength).astype(np.uint8))
        total += np.array(blotches.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return (DARK[0] + total).astype(np.uint8)


def _ink(digit: Array, side: int) -> Array:
    """Return how much of each pixel a digit of this side inks: `(side, side)` uint8."""
    scaled = np.array(Image.fromarray(digit).resize((side, side), Image.Resampling.BILINEAR), np.int32)
    return (scaled * 3 // 2).clip(max=255).astype(np.uint8)


def _paint(pixels: Array, ink: Array, colour: Array) -> None:
    """Lay ink of a colour over pixels `(side, side, 3)`, in place."""
    share = ink[..., None].astype(np.int32)
    pixels[:] = (pixels * (255 - share) + colour * share) // 255
