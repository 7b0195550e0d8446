"""Which split is what, and holding out a part of train where there is no validation split."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from pdvit.config.schema import DataConfig
from pdvit.data.randomness import fold
from pdvit.data.sources.labels import missing_classes
from pdvit.data.sources.split import LazySplit, Source, Split
from pdvit.errors import UserError

TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES = ("train", "training"), ("val", "validation", "valid"), ("test",)
ROLES = ("train", "val", "test")
HELD_OUT = 0.1
Lazy = TypeVar("Lazy", bound=LazySplit)


def choose_splits(found: Sequence[str], data: DataConfig) -> dict[str, str]:
    """Return which of the source's splits serve as train, val and test.

    What --train-split and --val-split name is taken as it is, even where it is not among those found (`train[:10%]`).
    There may be no val and no test.
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
    """Return a source of splits by role; where there is no val, a part of train is held out.

    Which classes a split lacks is said. Raises UserError where nothing can be held out.
    """
    parts: dict[str, Split] = {role: splits[role] for role in ROLES if role in splits}
    if "val" not in parts:
        parts["train"], parts["val"] = hold_out(splits["train"], data.split_seed)
        parts = {role: parts[role] for role in ROLES if role in parts}
        notes = (_how(data.split_seed, "test" in splits), *notes)
    missing = (missing_classes(split.labels, classes, role) for role, split in parts.items())
    return Source(name, classes, parts).noting(*notes, *missing)


def _how(seed: int, has_test: bool) -> str:
    why = "there is no validation split"
    if has_test:
        why += "; test is for the closing numbers (--val-split test evaluates on it and learns from all of train)"
    return f"val is {HELD_OUT:.0%} of the training images of each class, drawn by data.split_seed {seed}: {why}"


def hold_out(split: Lazy, seed: int) -> tuple[Lazy, Lazy]:
    """Divide a split into what is learned from and what is held out: a tenth of each class, at least one of two.

    Raises UserError where every class has one image only.
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
