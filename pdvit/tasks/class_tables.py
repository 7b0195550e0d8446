"""Scores by class, as tables: for eval.csv and confusion.csv."""

import csv
from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def class_table(confusion: Tensor, classes: list[str]) -> "pd.DataFrame":
    """Return one row per class, in the order of the classes.

    Args:
        confusion: images by class (rows) and most probable class (columns), `(C, C)`.
        classes: their names, all different.

    Returns:
        The columns class, images, accuracy (share of the class's images that were told right: its recall), precision
        (share of right ones among the images taken for the class), confused_with (the class that most of its other
        images were taken for; of several the first) and confused (how many those are). A share of no images is missing.
    """
    import pandas as pd

    right, of_class, taken_for = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    most = wrong.max(1)
    found = zip(most.values.tolist(), most.indices.tolist(), strict=True)
    columns = {
        "class": classes,
        "images": of_class.tolist(),
        "accuracy": _shares(right, of_class),
        "precision": _shares(right, taken_for),
        "confused_with": [classes[index] if count else None for count, index in found],
        "confused": most.values.tolist(),
    }
    return pd.DataFrame(columns)


def mask_table(confusion: Tensor, iou: Tensor, classes: list[str]) -> "pd.DataFrame":
    """Return one row per class of a confusion matrix of pixels: the columns of `class_table`, and the IoU."""
    table = class_table(confusion, classes).rename(columns={"images": "pixels"})
    table.insert(2, "iou", [None if value != value else value for value in iou.tolist()])
    return table


def confusion_table(confusion: Tensor, classes: list[str]) -> "pd.DataFrame":
    """Return the matrix as rows of class, predicted and images: every class with itself, and what else there was.

    So a matrix of many classes stays small, and the classes keep their order.
    """
    import pandas as pd

    shown = confusion > 0
    shown.fill_diagonal_(True)
    rows, columns = (index.tolist() for index in shown.nonzero(as_tuple=True))
    names = {"class": [classes[row] for row in rows], "predicted": [classes[column] for column in columns]}
    return pd.DataFrame(names | {"images": confusion[shown].tolist()})


def distinct(classes: list[str]) -> list[str]:
    """Return names that are all different: one that stands twice gets its number (ImageNet has two cranes)."""
    counts = Counter(classes)
    return [f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(classes)]


def table_bytes(table: "pd.DataFrame") -> bytes:
    """Return a table as a CSV file; names of any bytes stay as they are."""
    return table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC).encode(errors="surrogateescape")


def _shares(part: Tensor, whole: Tensor) -> list[float | None]:
    return [a / b if b else None for a, b in zip(part.tolist(), whole.tolist(), strict=True)]
