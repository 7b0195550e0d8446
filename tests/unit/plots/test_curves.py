from dataclasses import replace

import numpy as np
import pytest

from pdvit.plots.curves import plot_pairs, plot_spectrum
from pdvit.plots.reading import read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, analysis_folder):
    return analysis_folder(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def pairs(folder):
    return read_run(folder, "one", "pairs")


def test_every_layer_has_its_histogram_of_square_roots(pairs):
    figure = plot_pairs([pairs])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["embed", "1", "2", "3", "norm"]
    filled = sorted((patch for patch in axes.patches if patch.get_fill()), key=lambda patch: patch.get_data().baseline)
    for depth, (patch, layer) in enumerate(zip(filled, ("embed", "block 1"), strict=False)):
        heights, edges, baseline = patch.get_data()
        assert baseline == depth
        np.testing.assert_allclose(edges, pairs.curve("pairs", "edges")[layer])
        shares = pairs.curve("pairs", "histogram")[layer]
        np.testing.assert_allclose(((heights - depth) / (heights - depth).max()) ** 2, shares / shares.max())
    rows = figure.data[figure.data["layer"] == "block 2"]
    assert rows["share"].tolist() == pairs.curve("pairs", "histogram")["block 2"].tolist()


def test_ticks_are_medians(pairs):
    samples = np.random.default_rng(0).normal(0.3, 0.1, 10_000)
    pairs.curves["pairs"]["histogram/embed"] = np.histogram(samples, pairs.curves["pairs"]["edges/embed"])[0] / 10_000
    (axes,) = plot_pairs([pairs]).axes
    (tick,) = [line for line in axes.lines if line.get_ydata()[0] == 0]
    assert tick.get_xdata()[0] == pytest.approx(np.median(samples), abs=0.02)


def test_layers_whose_pairs_are_all_alike_are_drawn(pairs):
    arrays = {
        key: np.eye(20)[19] if key.startswith("histogram") else value for key, value in pairs.curves["pairs"].items()
    }
    alike = replace(pairs, curves={"pairs": arrays})
    assert plot_pairs([alike, replace(alike, name="two")]).axes[0].get_xlim() == (0.8, 1.0)


@pytest.mark.parametrize("count", [1, 3])
def test_every_spectrum_is_a_line_and_the_dc_share_the_last_panel(folder, count):
    run = read_run(folder, "run", "spectrum")
    figure = plot_spectrum([replace(run, name=f"run-{number}") for number in range(count)])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    for number in range(count):
        lines = panels[f"run-{number}"].lines
        assert len(lines) == 5
        assert lines[1].get_xdata().tolist() == [0, 0.5, 1]
        assert lines[1].get_ydata().tolist() == run.curve("spectrum", "by_frequency")["block 1"].tolist()
    shares = run.table[run.table["metric"] == "dc_share"]["mean"].tolist()
    assert [line.get_ydata().tolist() for line in panels["DC share of energy"].lines] == [shares] * count
    assert figure.data["metric"].value_counts().to_dict() == {"by_frequency": 15 * count, "dc_share": 5 * count}
