"""Match the outputs of a checkpoint with the classes of a source."""

from typing import Any

from pdvit.errors import UserError
from pdvit.models.loading import LoadedModel

TIP = "evaluate it on its own classes, by their names, or train it on these: pdvit finetune, for pixels pdvit segment"


def label_names(loaded: LoadedModel) -> list[str] | None:
    """Return the names of a checkpoint's classes, or None; UserError without a classifier, or for another number."""
    model: Any = loaded.model
    if model.num_classes < 1:
        raise UserError("the model has no classifier", loaded.name, "choose a checkpoint with a classifier")
    names = loaded.classes
    if names is not None and len(names) != model.num_classes:
        what = f"it has {len(names)} label_names for {model.num_classes} classes"
        raise UserError(what, loaded.name, "mend its config.json")
    return names


def match_classes(loaded: LoadedModel, classes: list[str], source: str) -> tuple[list[int] | None, str]:
    """Match the classes of a source with the outputs of a checkpoint, by name if it has names.

    Returns the output of each class, None for the same order; and how they were matched, as text. Raises UserError if
    the classes differ in number or by name.
    """
    names = label_names(loaded) if loaded.segment is None else loaded.classes
    model: Any = loaded.model
    count, where = model.num_classes if names is None else len(names), f"{loaded.name} on {source}"
    if names is None and count == len(classes):
        return None, "by position: the checkpoint does not name its classes"
    if names == classes:
        return None, "by name"
    if names is None or sorted(names) != sorted(classes):
        what = f"the checkpoint has {count} classes, {source} has {len(classes)}"
        if other := [name for name in classes if name not in (names or classes)]:
            what += f"; the checkpoint does not name '{other[0]}'"
        raise UserError(what, where, TIP)
    if twice := [name for name in names if names.count(name) > 1]:
        what = f"the classes stand in another order, and '{twice[0]}' is the name of two of them"
        raise UserError(what, where, "put the source's classes into the checkpoint's order")
    return [names.index(name) for name in classes], "by name, in another order"
