"""Which output of a checkpoint is which class of a source."""

from typing import Any

from pdvit.errors import UserError
from pdvit.models.description import class_names
from pdvit.models.weights import Loaded

TIP = "evaluate it on its own classes, or train it on these: pdvit finetune, of pixels pdvit segment"


def label_names(loaded: Loaded) -> list[str] | None:
    """Return the names of a checkpoint's classes; None where it does not say them.

    Raises UserError where the model has no classes, or other ones than its configuration names.
    """
    model: Any = loaded.model
    if model.num_classes < 1:
        raise UserError("the model has no classifier", loaded.name, "name a checkpoint that was trained on classes")
    names = class_names(loaded.config, loaded.name)
    if names is not None and len(names) != model.num_classes:
        what = f"it has {len(names)} label_names for {model.num_classes} classes"
        raise UserError(what, loaded.name, "mend its config.json")
    return names


def match(loaded: Loaded, classes: list[str], source: str) -> tuple[list[int] | None, str]:
    """Find each class of a source among a checkpoint's outputs.

    Returns:
        The output that is each class, None where they have the same order; and in words how they were matched.

    Raises:
        UserError: other classes than the checkpoint's, by number or by name.
    """
    model: Any = loaded.model
    return match_names(label_names(loaded), model.num_classes, loaded.name, classes, source)


def match_names(
    names: list[str] | None, count: int, checkpoint: str, classes: list[str], source: str
) -> tuple[list[int] | None, str]:
    """`match` for a checkpoint with `count` outputs of these names, where it says them."""
    where = f"{checkpoint} on {source}"
    if names is not None and set(classes) < set(names):
        what = f"{source} has {len(classes)} of the checkpoint's {count} classes"
        tip = "a share of right answers would depend on whether the other classes may be answered; " + TIP
        raise UserError(what, where, tip)
    if count != len(classes):
        raise UserError(f"the checkpoint has {count} classes, {source} has {len(classes)}", where, TIP)
    if names is None:
        return None, "by position: the checkpoint does not name its classes"
    if names == classes:
        return None, "by name"
    if set(names) != set(classes):
        here = next((name for name in classes if name not in names), classes[0])
        there = next((name for name in names if name not in classes), names[0])
        what = f"{source} has a class '{here}' that the checkpoint does not name (it has '{there}')"
        raise UserError(what, where, "give the source's classes the checkpoint's names; or " + TIP)
    if len(set(names)) < count:
        twice = next(name for name in names if names.count(name) > 1)
        what = f"the classes stand in another order, and '{twice}' is the name of two of them"
        raise UserError(what, where, "put the source's classes into the checkpoint's order")
    return [names.index(name) for name in classes], "by name, in another order"
