import numpy as np
import pytest
from matplotlib.patches import StepPatch

from pdvit.plots.curves import plot_pairs, plot_spectrum
from pdvit.plots.reading import read_analysis, read_curves


@pytest.fixture
def run(tmp_path, analysis_folder):
    return analysis_folder(tmp_path / "run")


@pytest.fixture
def pairs(run):
    return read_curves(run, "pairs", ("histogram", "edges"))


def histograms(axes) -> list[StepPatch]:
    return sorted((patch for patch in axes.patches if patch.get_fill()), key=lambda patch: patch.get_data().baseline)


def test_every_layer_has_its_histogram_of_square_roots(pairs):
    figure = plot_pairs([pairs], ["one"])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["embed", "1", "2", "3", "norm"]
    for depth, (patch, layer) in enumerate(zip(histograms(axes), ("embed", "block 1"), strict=False)):
        heights, edges, baseline = patch.get_data()
        assert baseline == depth
        np.testing.assert_allclose(edges, pairs[f"edges/{layer}"])
        shares = pairs[f"histogram/{layer}"]
        np.testing.assert_allclose(((heights - depth) / (heights - depth).max()) ** 2, shares / shares.max())
    rows = figure.data[figure.data["layer"] == "block 2"]
    assert rows["share"].tolist() == pairs["histogram/block 2"].tolist()


def test_ticks_are_medians(pairs):
    samples = np.random.default_rng(0).normal(0.3, 0.1, 10_000)
    pairs["histogram/embed"] = np.histogram(samples, pairs["edges/embed"])[0] / len(samples)
    (axes,) = plot_pairs([pairs], ["one"]).axes
    (tick,) = [line for line in axes.lines if line.get_ydata()[0] == 0]
    assert tick.get_xdata()[0] == pytest.approx(np.median(samples), abs=0.02)


def test_layers_whose_pairs_are_all_alike_are_drawn(pairs):
    pairs |= {key: np.eye(20)[19] for key in pairs if key.startswith("histogram")}
    assert plot_pairs([pairs, pairs], ["one", "two"]).axes[0].get_xlim() == (0.8, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_spectrum_is_a_line_and_the_dc_share_the_last_panel(run, count):
    arrays, table = read_curves(run, "spectrum", ("by_frequency", "frequency")), read_analysis(run)
    figure = plot_spectrum([arrays] * count, [table] * count, [f"run-{number}" for number in range(count)])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    for number in range(count):
        lines = panels[f"run-{number}"].lines
        assert len(lines) == 5
        assert lines[1].get_xdata().tolist() == [0, 0.5, 1]
        assert lines[1].get_ydata().tolist() == arrays["by_frequency/block 1"].tolist()
    shares = table[table["metric"] == "dc_share"]["mean"].tolist()
    assert [line.get_ydata().tolist() for line in panels["DC share of energy"].lines] == [shares] * count
    assert figure.data["metric"].value_counts().to_dict() == {"by_frequency": 15 * count, "dc_share": 5 * count}
