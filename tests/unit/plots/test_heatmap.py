import csv
import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pdvit.errors import UserError
from pdvit.plots.heatmap import DRAWN, NUMBERED, plot_cka, plot_confusion, plot_maps, read_confusion
from pdvit.plots.reading import read_arrays, read_run

LAYERS = np.array(["embed", "block 1", "norm"])


def tick_names(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def image(axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


@pytest.fixture
def cka(tmp_path, analysis_folder):
    return read_run(analysis_folder(tmp_path / "run"), "one", "cka")


@pytest.fixture
def maps(tmp_path, analysis_folder):
    folder = analysis_folder(tmp_path / "maps", tokens=(16, 16, 16, 4, 4))
    return read_arrays(folder / "analysis" / "maps.npz", "")


def test_cka_has_the_first_layer_at_the_bottom_left_and_between_models_a_panel_on_the_same_scale(cka):
    matrix = np.arange(6).reshape(2, 3) / 6
    between = {"matrix/other": matrix, "layers/other": LAYERS, "layers": LAYERS[:2]}
    figure = plot_cka([replace(cka, curves=cka.curves | {"cka_between": between})])
    own, other = figure.axes[:2]
    np.testing.assert_allclose(image(own), cka.curves["cka"]["matrix"])
    assert own.images[0].origin == "lower"
    assert tick_names(own.xaxis) == tick_names(own.yaxis) == ["embed", "1", "2", "3", "norm"]
    np.testing.assert_allclose(image(other), matrix)
    assert (tick_names(other.xaxis), tick_names(other.yaxis)) == (["embed", "1", "norm"], ["embed", "1"])
    assert own.images[0].get_clim() == other.images[0].get_clim()
    cells = figure.data[figure.data["run"] == "one (up), other"]
    assert cells.iloc[3][["layer", "other", "cka"]].tolist() == ["block 1", "embed", 0.5]


def test_a_map_is_the_row_of_its_patch_framed_where_it_lies(maps):
    figure = plot_maps(maps, "run", patches=[(1, 2)])
    picture, first, *_, last = figure.axes[:6]
    assert image(picture).tolist() == maps["image/0"].tolist()
    np.testing.assert_allclose(image(first), maps["cos/0/embed"][6].reshape(4, 4) / 127)
    # in the coarser grid, the patch that covers the same place
    np.testing.assert_allclose(image(last), maps["cos/0/norm"][1].reshape(2, 2) / 127)
    for axes, side in zip(figure.axes[:6], (8, 8, 8, 8, 16, 16), strict=True):
        (frame,) = axes.patches
        assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == (16, 8 if side == 8 else 0, side, side)
    rows = figure.data[figure.data["layer"] == "embed"]
    assert rows["cos"].tolist() == (maps["cos/0/embed"][6] / 127).tolist()
    assert rows.iloc[5][["row", "column"]].tolist() == [1, 1]


def test_maps_have_one_scale_three_patches_six_layers_and_the_image_that_is_named(tmp_path, analysis_folder):
    maps = read_arrays(analysis_folder(tmp_path / "deep", depth=12) / "analysis" / "maps.npz", "")
    figure = plot_maps(maps, "run", image=1)
    layers = figure.data["layer"].unique().tolist()
    assert (len(layers), layers[0], layers[-1]) == (6, "embed", "norm")
    assert figure.data["patch"].nunique() == 3
    assert image(figure.axes[0]).tolist() == maps["image/1"].tolist()
    assert figure.axes[0].get_title() == "dog.png"
    low = np.floor(5 * figure.data["cos"].min()) / 5
    unsigned = {key: abs(value) if key.startswith("cos/") else value for key, value in maps.items()}
    for drawn, scale, bar in ((figure, (-1, 1, "RdBu_r"), low), (plot_maps(unsigned, "run"), (0, 1, "viridis"), 0)):
        shown = [axes.images[0] for axes in drawn.axes[1:7]]
        assert {(*it.get_clim(), it.get_cmap().name) for it in shown} == {scale}
        assert drawn.axes[-1].get_ylim() == (bar, 1)  # the colour bar ends where the numbers end


@pytest.mark.parametrize("named", [{"patches": [(4, 0)]}, {"patches": [(0, 4)]}, {"patches": [(-1, 0)]}, {"image": 2}])
def test_a_patch_or_image_that_is_not_there_is_refused(maps, named):
    with pytest.raises(UserError, match="there is no"):
        plot_maps(maps, "run", **named)


def confusions(matrix: np.ndarray, names: list[str] | None = None) -> pd.DataFrame:
    names = names or [f"c{i}" for i in range(len(matrix))]
    cells = [(i, j) for i in range(len(names)) for j in range(len(names)) if i == j or matrix[i, j]]
    rows = [{"class": names[i], "predicted": names[j], "images": int(matrix[i, j])} for i, j in cells]
    return pd.DataFrame(rows, columns=["class", "predicted", "images"])


def random_matrix(classes: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.binomial(3, 2 / (classes + 1), (classes, classes)) + np.eye(classes, dtype=int) * 20


@pytest.mark.parametrize("classes", [1, NUMBERED + 1, 60])
def test_cells_are_fractions_of_the_class(classes):
    matrix = random_matrix(classes)
    figure = plot_confusion(confusions(matrix), "run")
    np.testing.assert_allclose(image(figure.axes[0]), matrix / matrix.sum(1, keepdims=True))
    right = matrix.trace() / matrix.sum()
    assert f"{right:.1%}".replace("%", " %") in figure.axes[0].get_title(loc="left")


def test_few_classes_have_numbers_in_their_cells_and_one_without_images_an_empty_row():
    figure = plot_confusion(confusions(np.array([[7, 0, 0], [2, 5, 0], [0, 0, 0]]), ["cat", "dog", "cow"]), "run")
    assert [text.get_text() for text in figure.axes[0].texts] == ["7", "2", "5"]
    assert tick_names(figure.axes[0].xaxis) == ["cat", "dog", "cow"]
    assert image(figure.axes[0])[2].tolist() == [0, 0, 0]


def test_many_classes_have_their_confusions_listed():
    matrix = np.eye(30, dtype=int) * 5
    assert "no confusions" in plot_confusion(confusions(matrix), "run").axes[1].get_title(loc="left")
    matrix[3, 4], matrix[7, 1] = 9, 2
    figure = plot_confusion(confusions(matrix), "run")
    assert tick_names(figure.axes[1].yaxis) == ["c3 → c4", "c7 → c1"]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [9, 2]


def test_of_very_many_classes_those_with_most_errors_are_drawn():
    count = DRAWN + 50
    matrix = np.eye(count, dtype=int) * 10
    matrix[list(range(20, 20 + DRAWN)), 0] = 10
    axes = plot_confusion(confusions(matrix), "run").axes[0]
    np.testing.assert_allclose(image(axes), np.eye(DRAWN) / 2)  # the class they were taken for is not among them
    assert tick_names(axes.yaxis)[0] == "c20"
    assert f"of {count}" in axes.get_title(loc="left")


def test_names_of_classes_stay_as_they_are(tmp_path):
    table, text = confusions(random_matrix(7), ["NA", "1", "", "01", "a,b", 'c"d', "e\nf"]), io.StringIO()
    table.to_csv(text, index=False, quoting=csv.QUOTE_NONNUMERIC)
    (tmp_path / "confusion.csv").write_text(text.getvalue())
    pd.testing.assert_frame_equal(read_confusion(tmp_path), table, check_dtype=False)
