from types import SimpleNamespace

import pytest

from pdvit.workflows.checkpoint import match_classes
from tests.errors import refused


def checkpoint(classes: int, names: list[str] | None) -> SimpleNamespace:
    return SimpleNamespace(model=SimpleNamespace(num_classes=classes), name="net", classes=names, segment=None)


@pytest.mark.parametrize(
    ("names", "classes", "order", "text"),
    [
        (["a", "b", "c"], ["a", "b", "c"], None, "by name"),
        (["c", "a", "b"], ["a", "b", "c"], [1, 2, 0], "another order"),
        (None, ["a", "b", "c"], None, "by position"),
        (["crane", "crane"], ["crane", "crane"], None, "by name"),
    ],
)
def test_classes_are_matched_by_name_if_there_are_names(names, classes, order, text):
    found, description = match_classes(checkpoint(len(classes), names), classes, "data")
    assert found == order
    assert text in description


@pytest.mark.parametrize(
    ("count", "names", "classes", "what"),
    [
        (3, None, ["a", "b"], "the checkpoint has 3 classes, data has 2"),
        (3, ["a", "b", "c"], ["a", "b"], "the checkpoint has 3 classes, data has 2"),
        (2, ["a", "b"], ["a", "b", "c"], "the checkpoint has 2 classes, data has 3"),
        (2, ["a", "b"], ["a", "x"], "'x'"),
        (3, ["a", "b", "a"], ["b", "a", "a"], "'a' is the name of two"),
        (0, None, ["a"], "no classifier"),
        (2, ["a"], ["a", "b"], "1 label_names for 2 classes"),
    ],
)
def test_other_classes_are_refused(count, names, classes, what):
    with refused(what):
        match_classes(checkpoint(count, names), classes, "data")
