import math

import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from pdvit.tasks.class_tables import class_table, confusion_table, distinct

MATRIX = torch.tensor([[5, 2, 2, 0], [0, 7, 0, 0], [4, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.int32)
NAMES = ["a", "b", "c", "d"]


def test_shares_are_those_of_scikit_learn():
    targets, predicted = (
        torch.repeat_interleave(index, MATRIX.flatten()) for index in (torch.arange(16) // 4, torch.arange(16) % 4)
    )
    precision, recall, _, support = precision_recall_fscore_support(
        targets, predicted, labels=list(range(4)), zero_division=math.nan
    )
    table = class_table(MATRIX, NAMES)
    assert table["accuracy"].tolist() == pytest.approx(recall.tolist(), nan_ok=True)
    assert table["precision"].tolist() == pytest.approx(precision.tolist(), nan_ok=True)
    assert table["images"].tolist() == support.tolist()
    assert math.isnan(table["accuracy"][3])


def test_the_most_frequent_confusion_is_named_and_of_several_the_first():
    table = class_table(MATRIX, NAMES)
    assert table["confused_with"].dropna().to_dict() == {0: "b", 2: "a"}
    assert table["confused"].tolist() == [2, 0, 4, 0]


def test_the_matrix_is_not_changed():
    before = MATRIX.clone()
    class_table(MATRIX, NAMES)
    confusion_table(MATRIX, NAMES)
    assert torch.equal(MATRIX, before)


def test_the_rows_of_the_matrix_have_every_class_and_every_confusion():
    rows = confusion_table(MATRIX, NAMES).itertuples(index=False)
    assert [tuple(row) for row in rows] == [
        *[("a", "a", 5), ("a", "b", 2), ("a", "c", 2), ("b", "b", 7)],
        *[("c", "a", 4), ("c", "c", 1), ("d", "d", 0)],
    ]


def test_names_that_stand_twice_get_their_number():
    assert distinct(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]
