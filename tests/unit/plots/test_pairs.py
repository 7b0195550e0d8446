import numpy as np
import pytest
from matplotlib.patches import StepPatch

from pdvit.plots.pairs import NEEDED, plot_pairs
from pdvit.plots.reading import read_curves


@pytest.fixture
def arrays(tmp_path, analysis_folder):
    return read_curves(analysis_folder(tmp_path / "run"), "pairs", NEEDED)


def ridges(axes) -> list[StepPatch]:
    return sorted((patch for patch in axes.patches if patch.get_fill()), key=lambda patch: patch.get_data().baseline)


def test_every_layer_has_its_histogram(arrays):
    (axes,) = plot_pairs([arrays], ["one"]).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["embed", "1", "2", "3", "norm"]
    for depth, (patch, layer) in enumerate(zip(ridges(axes), ("embed", "block 1"), strict=False)):
        values, edges, baseline = patch.get_data()
        assert baseline == depth
        np.testing.assert_allclose(edges, arrays[f"edges/{layer}"])
        shares = arrays[f"histogram/{layer}"]
        np.testing.assert_allclose(((values - depth) / (values - depth).max()) ** 2, shares / shares.max())


def test_ticks_are_medians(arrays):
    samples = np.random.default_rng(0).normal(0.3, 0.1, 10_000)
    arrays["histogram/embed"] = np.histogram(samples, arrays["edges/embed"])[0] / len(samples)
    (axes,) = plot_pairs([arrays], ["one"]).axes
    (tick,) = [line for line in axes.lines if line.get_ydata()[0] == 0]
    assert tick.get_xdata()[0] == pytest.approx(np.median(samples), abs=0.02)


def test_layers_whose_pairs_are_all_alike_are_drawn(arrays):
    for key in arrays:
        if key.startswith("histogram"):
            arrays[key] = np.eye(20)[19]
    figure = plot_pairs([arrays, arrays], ["one", "two"])
    assert figure.axes[0].get_xlim() == (0.8, 1.0)


def test_the_data_are_all_bars(arrays):
    data = plot_pairs([arrays], ["one"]).data
    assert len(data) == 5 * 20
    assert data[data["layer"] == "block 2"]["share"].tolist() == arrays["histogram/block 2"].tolist()
