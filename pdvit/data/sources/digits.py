"""Sources that need no files: scikit-learn's handwritten digits, and scenes of them on textured grounds.

A scene has the digit that every pixel belongs to. It is a function of its split and its number, in integers (also in
Pillow), so it is the same on every machine.
"""

import re
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import distribution

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.masks.table import Array, default_palette
from pdvit.data.randomness import fold, uniform
from pdvit.data.sources import WHERE
from pdvit.data.sources.split import ArraySplit, MaskSplit, Source
from pdvit.errors import UserError

SIDE, GROUND = 64, 10
CLASSES = [*map(str, range(10)), "ground"]
COUNTS = {"train": 4096, "val": 128, "test": 256}
# Digits per scene (min, max), sides of a digit in pixels, and the grid of its corner, which helps a small model.
DIGITS, SIDES, GRID = (3, 4), (28, 32, 36), 8
LIGHT, DARK = (200, 255), (20, 155)  # levels of red, green and blue of ink and ground (min, max)
# Ink from which a pixel belongs to the digit; the fraction of a digit that may cover others, else it is placed again.
INK, MAX_COVERED, TRIES = 64, 0.1, 6
HASHED_SCENES = 4


def read_digits(data: DataConfig, training: bool = True) -> Source:
    """Return 1,200 training, 237 validation and 360 test images, or the digits A to B of them; raises UserError."""
    match = re.fullmatch(r"digits(:([0-9])-([0-9]))?", data.source.lower())
    first, last = (int(match[2] or 0), int(match[3] or 9)) if match else (0, 0)
    if first >= last:
        raise UserError(f"'{data.source}' is no range of digits", WHERE, "for example digits:0-4")
    # To import scikit-learn takes a second.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")
    small = torch.from_numpy(table[:, :-1]).float().view(-1, 1, 8, 8) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear", align_corners=False)
    images, labels = large.round().to(torch.uint8).repeat(1, 3, 1, 1), torch.from_numpy(table[:, -1]).long()
    rest, test = stratified_split(table[:, -1], 360, data.split_seed)
    train, val = (rest[part] for part in stratified_split(table[rest, -1], 237, data.split_seed))
    splits = {}
    for name, part in (("train", train), ("val", val), ("test", test)):
        chosen = [index for index in part if first <= int(labels[index]) <= last]
        splits[name] = ArraySplit(images[chosen], labels[chosen] - first)
    return Source(data.source.lower(), [str(digit) for digit in range(first, last + 1)], splits)


def stratified_split(labels: Array, size: int, seed: int) -> tuple[Array, Array]:
    """Return the indices of both parts, the second of `size`, as scikit-learn's `train_test_split` draws them."""
    random = np.random.RandomState(seed)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    counts = np.array([len(part) for part in members])
    first = _proportional(counts, len(labels) - size, random)
    second = _proportional(counts - first, size, random)
    members = [part[random.permutation(len(part))] for part in members]
    parts = [part[:end] for part, end in zip(members, first, strict=True)]
    others = [part[end : end + count] for part, end, count in zip(members, first, second, strict=True)]
    return random.permutation(np.concatenate(parts)), random.permutation(np.concatenate(others))


def _proportional(counts: Array, total: int, random: np.random.RandomState) -> list[int]:
    """Divide a total in proportion to counts; the largest fractions are rounded up, equal ones at random."""
    exact = counts / counts.sum() * total
    whole = np.floor(exact)
    fractions, missing = exact - whole, int(total - whole.sum())
    for value in np.unique(fractions)[::-1]:
        if missing:
            places = np.flatnonzero(fractions == value)
            chosen = random.choice(places, min(len(places), missing), replace=False)
            whole[chosen] += 1
            missing -= len(chosen)
    return [int(count) for count in whole]


def read_scenes(data: DataConfig) -> Source:
    """Return scenes made of the digits of each split of `digits`, so no digit is in two splits."""
    digits, splits = read_digits(DataConfig(split_seed=data.split_seed)).splits, {}
    for name, count in COUNTS.items():
        split = digits[name]
        assert isinstance(split, ArraySplit)
        numbers = torch.arange(count)
        splits[name] = Scenes(split, name, numbers, torch.zeros_like(numbers))
    palette = default_palette(len(CLASSES) + 1)[1:-1]
    return Source("scenes", CLASSES, splits, palette=[*palette, (0, 0, 0)])


@dataclass(frozen=True)
class Scenes(MaskSplit):
    """Scenes of 64x64 pixels, made on demand from digits."""

    digits: ArraySplit
    role: str
    numbers: Tensor  # of each scene, `(N,)`
    labels: Tensor
    cache: dict[int, tuple[Array, Array]] = field(default_factory=dict, repr=False, compare=False)

    flip = 0.0  # a mirrored digit is another sign

    def open(self, index: int) -> Image.Image:
        """Return a scene."""
        return Image.fromarray(self.scene(index)[0])

    def mask(self, index: int) -> Tensor:
        """Return the digit of every pixel, 10 for the ground."""
        return torch.from_numpy(self.scene(index)[1])

    def name(self, index: int) -> str:
        """Return the name of a scene."""
        return f"scene {self.numbers[index]} of {self.role}"

    key = name

    def hash(self) -> str:
        """Return a hash of the numbers, the digits, and the pixels of a few scenes."""
        scenes = (part for index in range(min(HASHED_SCENES, len(self))) for part in self.scene(index))
        parts = (self.numbers, self.digits.images[:, 0], self.digits.labels, *scenes)
        return sha256(b"".join(np.asarray(part).tobytes() for part in parts)).hexdigest()[:16]

    def scene(self, index: int) -> tuple[Array, Array]:
        """Return a scene, made on first use: pixels `(64, 64, 3)` and digits `(64, 64)`, uint8."""
        if (number := int(self.numbers[index])) in self.cache:
            return self.cache[number]
        seed = fold([*COUNTS].index(self.role), number)
        pixels, mask = _ground(seed), np.full((SIDE, SIDE), GROUND, np.uint8)
        draws = uniform(seed, torch.arange(DIGITS[1] * TRIES + 1), 7).tolist()
        for place in range(_integer(DIGITS, draws.pop()[0])):
            for sample, size, down, right, *colour in draws[place * TRIES : (place + 1) * TRIES]:
                digit, side = int(sample * len(self.digits)), SIDES[int(size * len(SIDES))]
                small = Image.fromarray(self.digits.images[digit, 0].numpy())
                drawn = np.array(small.resize((side, side), Image.Resampling.BILINEAR), np.int32)
                ink = (drawn * 3 // 2).clip(max=255)
                top, left = (int(part * ((SIDE - side) // GRID + 1)) * GRID for part in (down, right))
                box, stroke = (slice(top, top + side), slice(left, left + side)), ink >= INK
                if (mask[box][stroke] != GROUND).mean() <= MAX_COVERED:
                    mask[box][stroke] = int(self.digits.labels[digit])
                    opacity, paint = ink[..., None], np.array([_integer(LIGHT, part) for part in colour])
                    pixels[box] = (pixels[box] * (255 - opacity) + paint * opacity) // 255
                    break
        self.cache[number] = pixels, mask
        return pixels, mask


def _integer(ends: tuple[int, int], draw: float) -> int:
    """Map a draw in [0, 1) to an integer from min to max."""
    return ends[0] + int(draw * (ends[1] - ends[0] + 1))


def _ground(seed: int) -> Array:
    """Return a ground of coloured blotches, large and small, and grain: `(64, 64, 3)` uint8."""
    total = np.zeros((SIDE, SIDE, 3), np.int32)
    for stream, (cells, strength) in enumerate(((4, 80), (13, 40), (SIDE, 15))):
        draws = uniform(fold(seed, stream), torch.arange(cells * cells), 3).numpy().reshape(cells, cells, 3)
        blotches = Image.fromarray((draws * strength).astype(np.uint8))
        total += np.array(blotches.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return (DARK[0] + total).astype(np.uint8)
