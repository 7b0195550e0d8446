"""The roles of splits, and validation images held out of train if a source has none."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.randomness import fold
from pdvit.data.sources.split import LazySplit, Source, Split, some
from pdvit.errors import UserError

TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES = ("train", "training"), ("val", "validation", "valid"), ("test",)
ROLES = ("train", "val", "test")
HELD_OUT = 0.1
Lazy = TypeVar("Lazy", bound=LazySplit)


def choose_splits(found: Sequence[str], data: DataConfig) -> dict[str, str]:
    """Return the names of the source's splits by role; val and test may be missing.

    The names in --train-split and --val-split need not be among those found (`train[:10%]`).
    """

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in found), None)

    chosen = {
        "train": data.train_split or first(TRAIN_NAMES),
        "val": data.val_split or first(VALIDATION_NAMES),
        "test": first(TEST_NAMES),
    }
    if chosen["test"] in (chosen["train"], chosen["val"]):
        chosen["test"] = None
    return {role: name for role, name in chosen.items() if name is not None}


def assemble(
    name: str, classes: list[str], splits: Mapping[str, LazySplit], data: DataConfig, notes: Sequence[str] = ()
) -> Source:
    """Return a source of splits by role, with notes on classes that a split lacks.

    Without val, a part of train is held out; raises UserError if that is impossible.
    """
    parts: dict[str, Split] = {role: splits[role] for role in ROLES if role in splits}
    if "val" not in parts:
        parts["train"], parts["val"] = hold_out(splits["train"], data.split_seed)
        parts = {role: parts[role] for role in ROLES if role in parts}
        note = f"val is {HELD_OUT:.0%} of the training images of each class, drawn by data.split_seed {data.split_seed}"
        note += ": there is no validation split"
        if "test" in splits:
            note += "; test is for the closing numbers (--val-split test evaluates on it and trains on all of train)"
        notes = (note, *notes)
    missing = (_missing_classes(split.labels, classes, role) for role, split in parts.items())
    return Source(name, classes, parts).noting(*notes, *missing)


def _missing_classes(labels: Tensor, classes: list[str], split: str) -> str:
    counts = labels.bincount(minlength=len(classes))
    missing = [classes[index] for index in (counts == 0).nonzero().flatten().tolist()]
    return f"{len(missing)} of {len(classes)} classes have no image in {split}: {some(missing)}" if missing else ""


def hold_out(split: Lazy, seed: int) -> tuple[Lazy, Lazy]:
    """Divide a split into training and held-out images: a tenth of each class, at least one of two.

    Raises UserError if every class has a single image.
    """
    rest, held = [], []
    order = split.labels.argsort(stable=True)
    for label, indices in enumerate(order.split(split.labels.bincount().tolist())):
        generator = torch.Generator().manual_seed(fold(seed, label))
        shuffled = indices[torch.randperm(len(indices), generator=generator)]
        count = max(round(HELD_OUT * len(indices)), int(len(indices) > 1))
        held.append(shuffled[:count])
        rest.append(shuffled[count:])
    if not sum(map(len, held)):
        what = "no class has two images, so none can be held out"
        raise UserError(what, "data.source (--data)", "add images, or a validation split")
    return split.take(torch.cat(rest).sort().values), split.take(torch.cat(held).sort().values)
