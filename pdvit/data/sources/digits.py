"""The digits that come with scikit-learn."""

import re
from functools import cache

import torch
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources import WHERE
from pdvit.data.sources.split import ArraySplit, Source
from pdvit.errors import UserError


def read_digits(data: DataConfig) -> Source:
    """Return 1,200 training, 237 validation and 360 test images, divided by `data.split_seed`.

    `digits:A-B` has the images of the digits A to B, in the same splits. Raises UserError for an invalid range.
    """
    from sklearn.model_selection import train_test_split

    match = re.fullmatch(r"digits(:([0-9])-([0-9]))?", data.source.lower())
    first, last = (int(match[2] or 0), int(match[3] or 9)) if match else (0, 0)
    if first >= last:
        raise UserError(f"'{data.source}' is no range of digits", WHERE, "for example digits:0-4")
    images, labels = _digits_images()

    def hold_out(indices: list[int], size: int) -> list[list[int]]:
        held: list[list[int]] = train_test_split(
            indices, test_size=size, random_state=data.split_seed, stratify=labels[indices]
        )
        return held

    rest, test = hold_out(list(range(len(labels))), 360)
    train, val = hold_out(rest, 237)
    splits = {}
    for name, part in (("train", train), ("val", val), ("test", test)):
        chosen = [index for index in part if first <= int(labels[index]) <= last]
        splits[name] = ArraySplit(images[chosen], labels[chosen] - first)
    classes = [str(digit) for digit in range(first, last + 1)]
    return Source(data.source.lower(), classes, splits)


@cache
def _digits_images() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 32x32, as `(N, 3, 32, 32)` uint8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long()
