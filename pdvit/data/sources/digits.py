"""The digits that come with scikit-learn."""

import re
from functools import cache

import torch
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources.split import ArraySplit, Source
from pdvit.errors import UserError


def read_digits(data: DataConfig) -> Source:
    """Return 1,200 training, 237 validation and 360 test images, divided by `data.split_seed`.

    `digits:A-B` has the images of the digits A to B, in the same splits. Raises UserError for an invalid range.
    """
    from sklearn.model_selection import train_test_split

    images, labels = _digits_images()

    def halve(indices: list[int], size: int) -> tuple[list[int], list[int]]:
        rest, held = train_test_split(indices, test_size=size, random_state=data.split_seed, stratify=labels[indices])
        return rest, held

    rest, test = halve(list(range(len(labels))), 360)
    train, val = halve(rest, 237)
    parts = {"train": train, "val": val, "test": test}
    splits = {name: ArraySplit(images[part], labels[part]) for name, part in parts.items()}
    classes = [str(digit) for digit in range(10)]
    if data.source.lower() == "digits":
        return Source("digits", classes, splits)
    first, last = _range(data.source)
    some = {name: _between(split, first, last) for name, split in splits.items()}
    return Source(f"digits:{first}-{last}", classes[first : last + 1], some)


def _range(source: str) -> tuple[int, int]:
    match = re.fullmatch(r"digits:([0-9])-([0-9])", source.lower())
    if match is None or not match[1] < match[2]:
        raise UserError(f"'{source}' is no range of digits", "data.source (--data)", "for example digits:0-4")
    return int(match[1]), int(match[2])


def _between(split: ArraySplit, first: int, last: int) -> ArraySplit:
    chosen = (split.labels >= first) & (split.labels <= last)
    return ArraySplit(split.images[chosen], split.labels[chosen] - first)


@cache
def _digits_images() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 32x32, as `(N, 3, 32, 32)` uint8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long()
