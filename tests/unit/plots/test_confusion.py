import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pdvit.errors import UserError
from pdvit.plots.heatmap import DRAWN, NUMBERED, plot_confusion, read_confusion
from pdvit.plots.style import render


def table_of(matrix: np.ndarray, names: list[str]) -> pd.DataFrame:
    cells = [(i, j) for i in range(len(names)) for j in range(len(names)) if i == j or matrix[i, j]]
    rows = [{"class": names[i], "predicted": names[j], "images": int(matrix[i, j])} for i, j in cells]
    return pd.DataFrame(rows, columns=["class", "predicted", "images"])


def random_matrix(classes: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.binomial(3, 2 / (classes + 1), (classes, classes)) + np.eye(classes, dtype=int) * 20


def drawn(figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def tick_names(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("classes", [1, NUMBERED, NUMBERED + 1, 120])
def test_cells_are_shares_of_the_class(classes):
    matrix = random_matrix(classes)
    figure = plot_confusion(table_of(matrix, [f"c{i}" for i in range(classes)]), "run")
    np.testing.assert_allclose(drawn(figure), matrix / matrix.sum(1, keepdims=True))
    right = matrix.trace() / matrix.sum()
    assert f"{right:.1%}".replace("%", " %") in figure.axes[0].get_title(loc="left")


def test_few_classes_have_numbers_in_their_cells():
    matrix = np.array([[7, 0], [2, 5]])
    figure = plot_confusion(table_of(matrix, ["cat", "dog"]), "run")
    assert [text.get_text() for text in figure.axes[0].texts] == ["7", "2", "5"]
    assert tick_names(figure.axes[0].xaxis) == ["cat", "dog"]


def test_many_classes_have_their_confusions_listed():
    matrix = np.eye(30, dtype=int) * 5
    matrix[3, 4], matrix[7, 1] = 9, 2
    figure = plot_confusion(table_of(matrix, [f"c{i}" for i in range(30)]), "run")
    assert tick_names(figure.axes[1].yaxis) == ["c3 → c4", "c7 → c1"]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [9, 2]


def test_no_confusion_is_no_error():
    figure = plot_confusion(table_of(np.eye(30, dtype=int), [f"c{i}" for i in range(30)]), "run")
    assert "no confusions" in figure.axes[1].get_title(loc="left")


def test_of_very_many_classes_those_with_most_errors_are_drawn():
    count = DRAWN + 50
    matrix = np.eye(count, dtype=int) * 10
    bad = list(range(20, 20 + DRAWN))
    matrix[bad, 0] = 10
    figure = plot_confusion(table_of(matrix, [f"c{i}" for i in range(count)]), "run")
    shares = drawn(figure)
    assert shares.shape == (DRAWN, DRAWN)
    np.testing.assert_allclose(shares, np.eye(DRAWN) / 2)  # the class they were taken for is not among them
    assert tick_names(figure.axes[0].yaxis)[0] == "c20"
    assert f"of {count}" in figure.axes[0].get_title(loc="left")


def test_a_class_without_images_is_an_empty_row():
    assert drawn(plot_confusion(table_of(np.array([[3, 0], [0, 0]]), ["a", "b"]), "run")).tolist() == [[1, 0], [0, 0]]


def test_names_in_any_script_are_drawn():
    names = [f"{'猫 $x_1$' * (i % 5)}\n{i}" for i in range(NUMBERED + 1)]
    assert len(render(plot_confusion(table_of(random_matrix(NUMBERED + 1), names), "run"), ".png")) > 10_000


def test_names_stay_as_they_are(tmp_path):
    names = ["NA", "1", "", "01", "a,b", 'c"d', "e\nf"]
    text = io.StringIO()
    table_of(random_matrix(7), names).to_csv(text, index=False, quoting=csv.QUOTE_NONNUMERIC)
    (tmp_path / "confusion.csv").write_text(text.getvalue())
    table = read_confusion(tmp_path)
    pd.testing.assert_frame_equal(table, table_of(random_matrix(7), names), check_dtype=False)


HEAD = "class,predicted,images\n"


@pytest.mark.parametrize(
    "content",
    [
        *("", HEAD, "a,b\n1,2\n", HEAD + "a,a,x\n", HEAD + "a,a,1\na,a,2\n", HEAD + "a,a,-1\n", HEAD + "a,a\n"),
        *(HEAD + "a,b,1\n", HEAD + 'a,"a,1\n', "\0" * 9),
    ],
)
def test_a_damaged_matrix_is_named(tmp_path, content):
    Path(tmp_path, "confusion.csv").write_text(content)
    with pytest.raises(UserError) as caught:
        read_confusion(tmp_path)
    assert f"pdvit eval {tmp_path}" in caught.value.tip
