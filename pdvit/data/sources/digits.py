"""The digits that come with scikit-learn."""

import re

import torch

from pdvit.config.schema import DataConfig
from pdvit.data.sources import WHERE
from pdvit.data.sources.split import ArraySplit, Source
from pdvit.errors import UserError


def read_digits(data: DataConfig, training: bool = True) -> Source:
    """Return 1,200 training, 237 validation and 360 test images, or the digits A to B of them; raises UserError."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    match = re.fullmatch(r"digits(:([0-9])-([0-9]))?", data.source.lower())
    first, last = (int(match[2] or 0), int(match[3] or 9)) if match else (0, 0)
    if first >= last:
        raise UserError(f"'{data.source}' is no range of digits", WHERE, "for example digits:0-4")
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear", align_corners=False)
    images, labels = large.round().to(torch.uint8).repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long()
    seed, rest = data.split_seed, list(range(len(labels)))
    rest, test = train_test_split(rest, test_size=360, random_state=seed, stratify=labels)
    train, val = train_test_split(rest, test_size=237, random_state=seed, stratify=labels[rest])
    splits = {}
    for name, part in (("train", train), ("val", val), ("test", test)):
        chosen = [index for index in part if first <= int(labels[index]) <= last]
        splits[name] = ArraySplit(images[chosen], labels[chosen] - first)
    return Source(data.source.lower(), [str(digit) for digit in range(first, last + 1)], splits)
