"""Labels that are given as numbers or texts, beside the images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pdvit.data.sources.split import some
from pdvit.errors import UserError


def as_classes(
    labels: Mapping[str, Sequence[Any]], names: Sequence[str] | None, where: str
) -> tuple[list[str], dict[str, Tensor]]:
    """Return the classes, and the class index of each sample `(N,)` by split.

    Whole numbers are indices: of `names`, or of as many classes as train counts up to. Texts are classes of their own,
    in order. Raises UserError for a label outside of the classes.
    """
    if names is None and all(isinstance(label, str) for label in labels["train"]):
        names = sorted(set(labels["train"]))
        known = {name: index for index, name in enumerate(names)}
        labels = {split: [known.get(label, label) for label in values] for split, values in labels.items()}
    if names is None:
        whole = [label for label in labels["train"] if _is_whole(label)]
        names = [str(index) for index in range(max(whole, default=-1) + 1)]
    for split, values in labels.items():
        _check(values, len(names), split, where)
    return list(names), {split: torch.tensor(values, dtype=torch.long) for split, values in labels.items()}


def missing_classes(labels: Tensor, classes: list[str], split: str) -> str:
    """Say which classes have no image in a split; empty where all have."""
    counts = labels.bincount(minlength=len(classes))
    missing = [classes[index] for index in (counts == 0).nonzero().flatten().tolist()]
    return f"{len(missing)} of {len(classes)} classes have no image in {split}: {some(missing)}" if missing else ""


def _check(labels: Sequence[Any], classes: int, split: str, where: str) -> None:
    outside = [at for at, label in enumerate(labels) if not (_is_whole(label) and 0 <= label < classes)]
    if outside:
        more = f" ({len(outside)} such)" if len(outside) > 1 else ""
        what = f"label {labels[outside[0]]!r} of sample {outside[0]} in {split} is none of the {classes} classes{more}"
        raise UserError(what, where, "-1 often means that a split has no labels: name another with --val-split")


def _is_whole(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool)
