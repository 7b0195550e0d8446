import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

from pdvit.plots import depth as plots
from pdvit.plots.depth import ATTENTION, differences
from pdvit.plots.reading import AnalyzedRun, read_run
from pdvit.plots.style import LIGHT
from tests.unit.plots.test_heatmap import tick_names


def named(*tables: pd.DataFrame, names=("one", "two")) -> list[AnalyzedRun]:
    return [AnalyzedRun(name, table) for name, table in zip(names, tables, strict=False)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, analysis_folder):
    return [analysis_folder(tmp_path_factory.mktemp("made") / f"{seed}", seed=seed) for seed in range(2)]


@pytest.fixture
def tables(folders):
    return [read_run(folder, "").table for folder in folders]


def values(table: pd.DataFrame, metric: str) -> list[float]:
    return table[table["metric"] == metric].sort_values("depth")["mean"].tolist()


def panels(figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def band(axes, depth: int, number: int = 0) -> list[float]:
    corners = axes.collections[number].get_paths()[0].vertices
    heights = corners[corners[:, 0] == depth, 1]
    return [heights.min(), heights.max()]


def test_lines_are_means_in_order_of_depth_bands_one_standard_deviation_and_p_runs_from_0_to_1(analysis_table):
    table = analysis_table([0.1, 0.2, 0.3, 0.4], std=0.05).sample(frac=1, random_state=0)
    axes = plots.plot_similarity(named(table)).axes[0]
    assert axes.lines[0].get_xydata().ravel().tolist() == pytest.approx([0, 0.1, 1, 0.2, 2, 0.3, 3, 0.4])
    assert band(axes, 2) == pytest.approx([0.25, 0.35])
    assert axes.get_ylim() == (0, 1)
    assert tick_names(axes.xaxis) == ["embed", "1", "2", "norm"]


def test_a_single_image_has_a_line_without_a_band_and_runs_of_other_depths_have_numbers(analysis_table):
    single = analysis_table([0.2, 0.4, 0.6], std=math.nan, images=1)
    figure = plots.plot_similarity(named(single, single.iloc[:4]))
    axes = figure.axes[0]
    assert band(axes, 1) == [0.4, 0.4]
    assert tick_names(axes.xaxis) == ["embed", "1", "2"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["one", "two"]


@pytest.mark.parametrize("blocks", [12, 48])
def test_tick_labels_of_deep_models_do_not_overlap(analysis_table, blocks):
    figure = plots.plot_similarity(named(analysis_table(np.linspace(0.2, 0.9, blocks + 2).tolist())))
    FigureCanvasAgg(figure).draw()
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_xticklabels()]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))


def test_random_weights_are_thin_and_dashed_and_stages_have_rings(analysis_table):
    table = analysis_table([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    table["tokens"] = table["depth"].map(dict(enumerate([64, 64, 16, 16, 4, 4])))
    random = table[table["metric"] == "similarity"].assign(metric="similarity_random", mean=0.7)
    figure = plots.plot_similarity(named(pd.concat([table, random])))
    line, dashed, rings = figure.axes[0].lines
    assert (dashed.get_ydata() == 0.7).all()
    assert dashed.get_linestyle() == "--"
    assert dashed.get_linewidth() < line.get_linewidth()
    assert rings.get_xydata().tolist() == [[2, 0.3], [4, 0.5]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["one", "P of random weights", "a new stage"]


def test_every_metric_has_a_panel_with_a_line_per_run_that_has_it(tables):
    less = tables[0][tables[0]["metric"] != "norm_peak"]
    found = panels(plots.plot_metrics(named(less, tables[1])))
    # P of random weights is drawn with P, and an unknown metric under its name
    assert len(found) == tables[0]["metric"].nunique() - 1
    assert "new metric" in found
    for number, table in enumerate(tables):
        assert found["token length ± std"].lines[number].get_ydata().tolist() == values(table, "norm_mean")
    (line,) = found["largest length / median"].lines
    assert line.get_color() == LIGHT.colours[1]
    assert len(found["P, mean |cos|"].lines) == 4
    blocks_only = found["attention entropy, nats"]
    assert blocks_only.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert blocks_only.get_xlim() == found["P, mean |cos|"].get_xlim()


def test_bands_and_axes_end_where_the_metric_does(tables):
    wide = tables[0].assign(std=5.0)
    wide.loc[wide["metric"] == "norm_outliers", ["mean", "std"]] = 0
    found = panels(plots.plot_metrics(named(wide)))
    assert band(found["P, mean |cos|"], 1) == [0, 1]
    assert band(found["mean cos, signed"], 1) == [-1, 1]
    assert band(found["token length, std"], 1)[0] == 0
    assert [found[title].get_ylim()[0] for title in ("token length, std", "share of outliers")] == [0, 0]


def test_norms_are_length_with_spread_over_patches_peak_and_outliers(tables):
    table = tables[0]
    figure = plots.plot_norms(named(table))
    for axes, metric in zip(figure.axes, ("norm_mean", "norm_peak", "norm_outliers"), strict=True):
        assert axes.lines[0].get_ydata().tolist() == values(table, metric)
    for depth, (mean, std) in enumerate(zip(values(table, "norm_mean"), values(table, "norm_std"), strict=True)):
        assert band(figure.axes[0], depth) == pytest.approx([max(0, mean - std), mean + std])
    assert set(figure.data["metric"]) == {"norm_mean", "norm_std", "norm_peak", "norm_outliers"}
    axes = plots.plot_norms(named(table.assign(mean=10.0 ** table["depth"]))).axes[0]
    assert axes.get_yscale() == "log"
    FigureCanvasAgg(axes.figure).draw()
    assert {"1", "100"} <= {text.get_text() for text in axes.get_yticklabels()}


def test_a_difference_has_the_interval_of_scipy(analysis_table):
    rng = np.random.default_rng(0)
    samples = [rng.normal(0.4, 0.1, (8, 4)), rng.normal(0.6, 0.02, (20, 4))]
    tables = []
    for sample in samples:
        table = analysis_table(sample.mean(0).tolist(), images=len(sample))
        tables.append(table.assign(std=np.tile(sample.std(0, ddof=1), (2, 1)).T.ravel()))
    found = differences(tables, "similarity")
    expected = stats.ttest_ind(*samples[::-1], equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(found["mean"], samples[1].mean(0) - samples[0].mean(0))
    np.testing.assert_allclose(found[["low", "high"]].to_numpy().T, [expected.low, expected.high])


def test_layers_are_compared_by_name_and_single_images_have_no_interval(analysis_table):
    shallow, deep = analysis_table([0.1, 0.2, 0.3]), analysis_table([0.1, 0.2, 0.6, 0.8], std=math.nan, images=1)
    found = differences([shallow, deep], "similarity")
    assert found["layer"].tolist() == ["embed", "block 1", "norm"]
    assert found["mean"].tolist() == pytest.approx([0, 0, 0.5])
    assert found["low"].isna().all()
    plots.plot_compare(named(shallow, deep))


def test_two_analyses_are_compared_in_p_its_difference_and_all_metrics_of_both(tables):
    first, second = tables[0], tables[1][tables[1]["metric"] != "norm_peak"]
    figure = plots.plot_compare(named(first, second))
    change = differences([first, second], "similarity")
    assert figure.axes[0].lines[0].get_ydata().tolist() == values(first, "similarity")
    assert figure.axes[1].containers[0].lines[0].get_ydata().tolist() == change["mean"].tolist()
    assert "P of two" in figure.axes[1].get_title(loc="left")
    assert figure.data[figure.data["run"] == "difference"]["low"].tolist() == change["low"].tolist()
    assert len(panels(figure)) == 1 + second["metric"].nunique() - 1  # P of random weights has no panel
    assert "largest length / median" not in panels(figure)


def test_every_head_is_a_dot_their_mean_a_line_and_uniform_attention_is_marked(folders):
    run = read_run(folders[0], "one", "attention")
    figure = plots.plot_attention([run, replace(run, name="two")])
    for axes, curve in zip(figure.axes, ATTENTION, strict=True):
        heads, mean, others = axes.lines[:3]
        expected = np.array([run.curve("attention", curve)[f"block {block}"] for block in (1, 2, 3)])
        assert heads.get_ydata().tolist() == expected.ravel().tolist()
        assert mean.get_xdata().tolist() == [1, 2, 3]
        np.testing.assert_allclose(mean.get_ydata(), expected.mean(1))
        assert (others.get_xdata() > heads.get_xdata()).all()
        rows = figure.data[(figure.data["run"] == "one") & (figure.data["curve"] == curve)]
        assert rows["value"].tolist() == expected.ravel().tolist()
        assert rows["head"].tolist() == [1, 2] * 3
    assert any(line.get_ydata()[0] == pytest.approx(math.log(16)) for line in figure.axes[0].lines)


def test_every_layer_has_its_histogram_of_square_roots_with_the_median(folders):
    run = read_run(folders[0], "one", "pairs")
    samples = np.random.default_rng(0).normal(0.3, 0.1, 10_000)
    run.curves["pairs"]["histogram/embed"] = np.histogram(samples, run.curves["pairs"]["edges/embed"])[0] / 10_000
    figure = plots.plot_pairs([run])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["embed", "1", "2", "3", "norm"]
    filled = sorted((patch for patch in axes.patches if patch.get_fill()), key=lambda patch: patch.get_data().baseline)
    for depth, (patch, layer) in enumerate(zip(filled, ("embed", "block 1"), strict=False)):
        heights, edges, baseline = patch.get_data()
        assert baseline == depth
        np.testing.assert_allclose(edges, run.curve("pairs", "edges")[layer])
        shares = run.curve("pairs", "histogram")[layer]
        np.testing.assert_allclose(((heights - depth) / (heights - depth).max()) ** 2, shares / shares.max())
    (tick,) = [line for line in axes.lines if line.get_ydata()[0] == 0]
    assert tick.get_xdata()[0] == pytest.approx(np.median(samples), abs=0.02)
    rows = figure.data[figure.data["layer"] == "block 2"]
    assert rows["share"].tolist() == run.curve("pairs", "histogram")["block 2"].tolist()
    # layers whose pairs are all alike
    for name in [name for name in run.curves["pairs"] if name.startswith("histogram")]:
        run.curves["pairs"][name] = np.eye(20)[19]
    assert plots.plot_pairs([run, replace(run, name="two")]).axes[0].get_xlim() == (0.8, 1.0)


def test_every_spectrum_is_a_line(folders):
    run = read_run(folders[0], "run", "spectrum")
    figure = plots.plot_spectrum([replace(run, name=f"run-{number}") for number in range(3)])
    found = panels(figure)
    for number in range(3):
        lines = found[f"run-{number}"].lines
        assert len(lines) == 5
        assert lines[1].get_xdata().tolist() == [0, 0.5, 1]
        assert lines[1].get_ydata().tolist() == run.curve("spectrum", "by_frequency")["block 1"].tolist()
    assert len(figure.data) == 15 * 3
    assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["embed", "1", "2", "3", "norm"]
