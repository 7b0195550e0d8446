import math
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from scipy import stats

from pdvit.plots.depth import (
    ATTENTION,
    differences,
    plot_attention,
    plot_compare,
    plot_metrics,
    plot_norms,
    plot_similarity,
    separate,
)
from pdvit.plots.reading import AnalyzedRun, read_run
from pdvit.plots.style import LIGHT, text_colour


def named(*tables: pd.DataFrame, names=("one", "two")) -> list[AnalyzedRun]:
    return [AnalyzedRun(name, table) for name, table in zip(names, tables, strict=False)]


@pytest.fixture
def draw(analysis_table):
    """Return a function that draws named lists of P."""

    def make(std: float = 0.05, images: int = 8, **lines: list[float]):
        figure = plot_similarity(
            [AnalyzedRun(name, analysis_table(values, std, images)) for name, values in lines.items()]
        )
        FigureCanvasAgg(figure).draw()
        return figure

    return make


@pytest.fixture
def tables(tmp_path, analysis_folder):
    return [read_run(analysis_folder(tmp_path / f"{seed}", seed=seed), "").table for seed in range(2)]


def values(table: pd.DataFrame, metric: str) -> list[float]:
    return table[table["metric"] == metric].sort_values("depth")["mean"].tolist()


def panels(figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def box(figure, text):
    return Text.get_window_extent(text, FigureCanvasAgg(figure).get_renderer())  # without the leader


def band(axes, depth: int, number: int = 0) -> list[float]:
    corners = axes.collections[number].get_paths()[0].vertices
    heights = corners[corners[:, 0] == depth, 1]
    return [heights.min(), heights.max()]


def test_lines_are_means_in_order_of_depth_bands_one_standard_deviation_and_p_runs_from_0_to_1(analysis_table):
    table = analysis_table([0.1, 0.2, 0.3, 0.4], std=0.05).sample(frac=1, random_state=0)
    axes = plot_similarity(named(table)).axes[0]
    assert axes.lines[0].get_xydata().ravel().tolist() == pytest.approx([0, 0.1, 1, 0.2, 2, 0.3, 3, 0.4])
    assert band(axes, 2) == pytest.approx([0.25, 0.35])
    assert axes.get_ylim() == (0, 1)


def test_a_single_image_has_a_line_without_a_band(draw):
    axes = draw(std=math.nan, images=1, one=[0.2, 0.4, 0.6]).axes[0]
    assert band(axes, 1) == [0.4, 0.4]
    assert "1 image," in axes.get_title(loc="left")


@pytest.mark.parametrize("end", [0.0, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("count", [2, 6])
def test_names_at_line_ends_overlap_nothing_and_stay_inside(draw, end, count):
    figure = draw(**{f"run-{number}{'n' * 30 * number}": [0.5, 0.5, end] for number in range(count)})
    axes = figure.axes[0]
    boxes = [box(figure, text) for text in axes.texts]
    assert [text.get_text()[:5] for text in axes.texts] == [f"run-{number}" for number in range(count)]
    assert [text.get_color() for text in axes.texts] == [text_colour(line.get_color(), LIGHT) for line in axes.lines]
    title = next(text for text in axes.findobj(Text) if text.get_text() == axes.get_title(loc="left"))
    others = [box(figure, text) for text in (*axes.get_xticklabels(), title)]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
    assert not any(one.overlaps(other) for one in boxes for other in others)
    assert all(axes.get_window_extent().x1 <= one.x0 <= one.x1 <= figure.bbox.x1 for one in boxes)
    assert all(figure.bbox.y0 <= one.y0 <= one.y1 <= figure.bbox.y1 for one in boxes)


def test_a_name_that_had_to_move_has_a_leader_to_its_line(draw):
    texts = draw(one=[0.5, 0.5, 0.5], two=[0.5, 0.5, 0.51], three=[0.1, 0.1, 0.1]).axes[0].texts
    assert [(text.xy[1], text.arrow_patch is not None) for text in texts] == [(0.5, True), (0.51, True), (0.1, False)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_separated_heights_are_a_gap_apart_with_order_and_middle_kept(heights):
    placed = separate(heights, 0.06)
    ranked = [placed[at] for at in sorted(range(len(heights)), key=lambda at: heights[at])]
    assert all(above - below >= 0.9 * 0.06 for below, above in pairwise(ranked))
    assert sum(placed) == pytest.approx(sum(heights), abs=1e-6)
    assert separate([0.9, 0.1, 0.5], 0.06) == [0.9, 0.1, 0.5]


def test_depths_are_named_by_layer_and_where_runs_differ_in_depth_by_number(draw):
    names = [text.get_text() for text in draw(one=[0.1, 0.2, 0.3, 0.4]).axes[0].get_xticklabels()]
    assert names == ["embed", "1", "2", "norm"]
    axes = draw(one=[0.1, 0.2, 0.3], two=[0.1, 0.2, 0.3, 0.4, 0.5]).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["embed", "1", "2", "3", "4"]


@pytest.mark.parametrize("blocks", [12, 13, 48])
def test_tick_labels_of_deep_models_do_not_overlap(draw, blocks):
    figure = draw(one=np.linspace(0.2, 0.9, blocks + 2).tolist())
    boxes = [box(figure, tick) for tick in figure.axes[0].get_xticklabels()]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))


def test_random_weights_are_thin_and_dashed_and_stages_have_rings(analysis_table):
    table = analysis_table([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    table["tokens"] = table["depth"].map(dict(enumerate([64, 64, 16, 16, 4, 4])))
    random = table[table["metric"] == "similarity"].assign(metric="similarity_random", mean=0.7)
    (axes,) = plot_similarity(named(pd.concat([table, random]))).axes
    line, dashed, rings = axes.lines
    assert (dashed.get_ydata() == 0.7).all()
    assert dashed.get_linestyle() == "--"
    assert dashed.get_linewidth() < line.get_linewidth()
    assert rings.get_xydata().tolist() == [[2, 0.3], [4, 0.5]]
    assert [text.get_text() for text in axes.get_legend().texts] == ["P of random weights", "a new stage"]


def test_every_metric_has_a_panel_with_a_line_per_run(tables):
    found = panels(plot_metrics(named(*tables)))
    # P of random weights is drawn with P, and an unknown metric under its name
    assert len(found) == tables[0]["metric"].nunique() - 1
    assert "new metric" in found
    for number, table in enumerate(tables):
        assert found["token length ± std"].lines[number].get_ydata().tolist() == values(table, "norm_mean")
    assert len(found["P, mean |cos|"].lines) == 4
    blocks_only = found["attention entropy, nats"]
    assert blocks_only.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert blocks_only.get_xlim() == found["P, mean |cos|"].get_xlim()


def test_a_metric_that_one_run_lacks_has_the_other_line(tables):
    less = tables[0][tables[0]["metric"] != "norm_mean"]
    figure = plot_metrics(named(less, tables[1]))
    (line,) = panels(figure)["token length ± std"].lines
    assert line.get_color() == LIGHT.colours[1]


def test_bands_end_where_the_metric_does(tables):
    found = panels(plot_metrics(named(tables[0].assign(std=5.0))))
    assert band(found["P, mean |cos|"], 1) == [0, 1]
    assert band(found["mean cos, signed"], 1) == [-1, 1]
    assert band(found["token length, std"], 1)[0] == 0


def test_norms_are_length_with_spread_over_patches_peak_and_outliers(tables):
    table = tables[0]
    figure = plot_norms(named(table))
    for axes, metric in zip(figure.axes, ("norm_mean", "norm_peak", "norm_outliers"), strict=True):
        assert axes.lines[0].get_ydata().tolist() == values(table, metric)
    for depth, (mean, std) in enumerate(zip(values(table, "norm_mean"), values(table, "norm_std"), strict=True)):
        assert band(figure.axes[0], depth) == pytest.approx([max(0, mean - std), mean + std])
    assert set(figure.data["metric"]) == {"norm_mean", "norm_std", "norm_peak", "norm_outliers"}


def test_lengths_of_very_different_size_are_drawn_on_a_logarithmic_axis(tables):
    assert plot_norms(named(tables[0].assign(mean=1.0))).axes[0].get_yscale() == "linear"
    axes = plot_norms(named(tables[0].assign(mean=10.0 ** tables[0]["depth"]))).axes[0]
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


def test_two_analyses_are_compared_in_p_its_difference_and_all_metrics_of_both(tables):
    first, second = tables[0], tables[1][tables[1]["metric"] != "norm_peak"]
    figure = plot_compare(named(first, second))
    change = differences([first, second], "similarity")
    assert figure.axes[0].lines[0].get_ydata().tolist() == values(first, "similarity")
    assert figure.axes[1].containers[0].lines[0].get_ydata().tolist() == change["mean"].tolist()
    assert "P of two" in figure.axes[1].get_title(loc="left")
    assert figure.data[figure.data["run"] == "difference"]["low"].tolist() == change["low"].tolist()
    assert len(panels(figure)) == 1 + second["metric"].nunique() - 1  # P of random weights has no panel
    assert "largest length / median" not in panels(figure)


def test_layers_are_compared_by_name_and_single_images_have_no_interval(analysis_table):
    shallow, deep = analysis_table([0.1, 0.2, 0.3]), analysis_table([0.1, 0.2, 0.6, 0.8], std=math.nan, images=1)
    found = differences([shallow, deep], "similarity")
    assert found["layer"].tolist() == ["embed", "block 1", "norm"]
    assert found["mean"].tolist() == pytest.approx([0, 0, 0.5])
    assert found["low"].isna().all()
    plot_compare(named(shallow, deep))


def test_every_head_is_a_dot_their_mean_a_line_and_uniform_attention_is_marked(tmp_path, tables):
    run = read_run(tmp_path / "0", "one", "attention")
    figure = plot_attention([run, replace(run, name="two")])
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
