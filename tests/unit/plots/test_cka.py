import numpy as np
import pytest

from pdvit.errors import UserError
from pdvit.plots.heatmap import plot_cka, read_between
from pdvit.plots.reading import read_curves

NEEDED = ("matrix", "layers")
ROWS, COLUMNS = np.array(["embed", "block 1"]), np.array(["embed", "block 1", "norm"])


@pytest.fixture
def run(tmp_path, analysis_folder):
    return analysis_folder(tmp_path / "run")


@pytest.fixture
def between(run):
    arrays = {"matrix/other": np.arange(6).reshape(2, 3) / 6, "layers/other": COLUMNS, "layers": ROWS}
    np.savez(run / "analysis" / "cka_between.npz", **arrays)
    return arrays


def test_a_matrix_is_drawn_with_the_first_layer_at_the_bottom_left(run):
    arrays = read_curves(run, "cka", NEEDED)
    axes = plot_cka([arrays], ["one"]).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), arrays["matrix"])
    assert axes.images[0].origin == "lower"
    for axis in (axes.xaxis, axes.yaxis):
        assert [text.get_text() for text in axis.get_ticklabels()] == ["embed", "1", "2", "3", "norm"]


def test_two_models_have_a_panel_of_their_own(run, between):
    figure = plot_cka([read_curves(run, "cka", NEEDED)], ["one"], [("one", read_between(run))])
    axes = figure.axes[1]
    np.testing.assert_allclose(axes.images[0].get_array(), between["matrix/other"])
    assert [text.get_text() for text in axes.xaxis.get_ticklabels()] == ["embed", "1", "norm"]
    assert [text.get_text() for text in axes.yaxis.get_ticklabels()] == ["embed", "1"]
    assert figure.axes[0].images[0].get_clim() == axes.images[0].get_clim()


def test_the_data_are_the_cells(run, between):
    data = plot_cka([], [], [("one", read_between(run))]).data
    cells = [("block 1", "embed", 0.5)]
    assert data.loc[3:3, ["layer", "other", "cka"]].itertuples(index=False, name=None).__next__() == cells[0]


def test_without_other_models_there_is_nothing_between(run):
    assert read_between(run) is None


def test_a_matrix_that_does_not_fit_its_layers_is_refused(run, between):
    np.savez(run / "analysis" / "cka_between.npz", **between | {"layers": COLUMNS})
    with pytest.raises(UserError, match="damaged"):
        read_between(run)
