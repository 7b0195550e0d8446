import numpy as np
import pytest

from pdvit.errors import UserError
from pdvit.plots.heatmap import plot_maps, read_maps


@pytest.fixture
def arrays(tmp_path, analysis_folder):
    return read_maps(analysis_folder(tmp_path / "run", tokens=(16, 16, 16, 4, 4)))


def test_a_map_is_the_row_of_its_patch(arrays):
    figure = plot_maps(arrays, "run", patches=[(1, 2)])
    picture, first, *_, last = figure.axes[:6]
    assert picture.images[0].get_array().tolist() == arrays["image/0"].tolist()
    np.testing.assert_allclose(first.images[0].get_array(), arrays["cos/0/embed"][6].reshape(4, 4) / 127)
    # in the coarser grid, the patch that covers the same place
    np.testing.assert_allclose(last.images[0].get_array(), arrays["cos/0/norm"][1].reshape(2, 2) / 127)


def test_the_patch_is_framed_where_it_lies(arrays):
    figure = plot_maps(arrays, "run", patches=[(1, 2)])
    for axes, side in zip(figure.axes[:6], (8, 8, 8, 8, 16, 16), strict=True):
        (frame,) = axes.patches
        place = (16, 8) if side == 8 else (16, 0)
        assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == (*place, side, side)


def test_three_patches_are_chosen_where_none_is_named(arrays):
    assert plot_maps(arrays, "run").data["patch"].nunique() == 3


def test_another_image_is_drawn(arrays):
    figure = plot_maps(arrays, "run", image=1)
    assert figure.axes[0].images[0].get_array().tolist() == arrays["image/1"].tolist()
    assert figure.axes[0].get_title() == "dog.png"


def test_all_maps_have_one_scale(arrays):
    limits = {image.get_clim() for axes in plot_maps(arrays, "run").axes for image in axes.images if image.cmap}
    shown = plot_maps(arrays, "run").data["cos"]
    assert {(low, high) for low, high in limits if high == 1} == {(np.floor(5 * shown.min()) / 5, 1)}


def test_the_data_are_the_maps(arrays):
    data = plot_maps(arrays, "run", patches=[(3, 3)]).data
    rows = data[data["layer"] == "embed"]
    assert rows["cos"].tolist() == (arrays["cos/0/embed"][15] / 127).tolist()
    assert list(zip(rows["row"], rows["column"], strict=True))[5] == (1, 1)


def test_of_many_layers_six_are_shown(tmp_path, analysis_folder):
    arrays = read_maps(analysis_folder(tmp_path / "deep", depth=12))
    layers = plot_maps(arrays, "run").data["layer"].unique().tolist()
    assert len(layers) == 6
    assert (layers[0], layers[-1]) == ("embed", "norm")


@pytest.mark.parametrize("patch", [(4, 0), (0, 4), (-1, 0)])
def test_a_patch_outside_is_refused(arrays, patch):
    with pytest.raises(UserError) as caught:
        plot_maps(arrays, "run", patches=[patch])
    assert "0 to 3" in caught.value.tip


def test_an_image_that_is_not_there_is_refused(arrays):
    with pytest.raises(UserError, match="image 2"):
        plot_maps(arrays, "run", image=2)


def test_without_maps_the_command_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        read_maps(tmp_path)
    assert "--explore" in caught.value.tip


def test_an_incomplete_file_is_refused(tmp_path, arrays):
    (tmp_path / "less" / "analysis").mkdir(parents=True)
    del arrays["grid/block 1"]
    np.savez(tmp_path / "less" / "analysis" / "maps.npz", **arrays)
    with pytest.raises(UserError, match="damaged"):
        read_maps(tmp_path / "less")
