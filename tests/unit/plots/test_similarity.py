import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import ConnectionPatch
from matplotlib.text import Text

from pdvit.plots.similarity import plot_similarity
from pdvit.plots.style import LIGHT, readable


@pytest.fixture
def draw(analysis_table):
    """Return a function that draws named lists of P, and closes the figures at the end."""

    def make(std: float = 0.05, images: int = 8, **lines: list[float]):
        tables = [analysis_table(values, std, images) for values in lines.values()]
        figure = plot_similarity(tables, list(lines))
        FigureCanvasAgg(figure).draw()
        return figure

    yield make
    plt.close("all")


def labels(figure) -> list:
    return list(figure.axes[0].texts)


def box(figure, artist):
    return artist.get_window_extent(FigureCanvasAgg(figure).get_renderer())


def test_the_lines_are_the_tables(draw):
    values = {"one": [0.1, 0.2, 0.3, 0.4], "two": [0.9, 0.8, 0.7, 0.6]}
    for line, expected in zip(draw(**values).axes[0].lines, values.values(), strict=True):
        assert line.get_xdata().tolist() == [0, 1, 2, 3]
        assert line.get_ydata().tolist() == pytest.approx(expected)


def test_rows_may_come_in_any_order(analysis_table):
    table = analysis_table([0.1, 0.2, 0.3, 0.4]).sample(frac=1, random_state=0)
    (line,) = plot_similarity([table], ["one"]).axes[0].lines
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    plt.close("all")


def test_the_band_is_one_standard_deviation(draw):
    (band,) = draw(one=[0.2, 0.4, 0.6]).axes[0].collections
    corners = band.get_paths()[0].vertices
    for depth, mean in enumerate([0.2, 0.4, 0.6]):
        heights = corners[corners[:, 0] == depth, 1]
        assert (heights.min(), heights.max()) == pytest.approx((mean - 0.05, mean + 0.05))


def test_without_a_spread_the_band_has_no_height(draw):
    for band in draw(std=math.nan, images=1, one=[0.2, 0.4, 0.6]).axes[0].collections:
        corners = band.get_paths()[0].vertices
        for depth in range(3):
            assert np.ptp(corners[corners[:, 0] == depth, 1]) == 0


def test_p_runs_from_zero_to_one(draw):
    assert draw(one=[0.4, 0.41, 0.42]).axes[0].get_ylim() == (0, 1)


def test_every_line_is_named_in_its_colour(draw):
    figure = draw(one=[0.1, 0.2, 0.3], two=[0.4, 0.5, 0.6])
    assert [text.get_text() for text in labels(figure)] == ["one", "two"]
    for line, text in zip(figure.axes[0].lines, labels(figure), strict=True):
        assert text.get_color() == readable(line.get_color(), LIGHT)


@pytest.mark.parametrize("end", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("count", [2, 6])
def test_labels_overlap_nothing_and_stay_inside(draw, end, count):
    figure = draw(**{f"run-{number}": [0.5, 0.5, end] for number in range(count)})
    boxes = [box(figure, text) for text in labels(figure)]
    for one, two in combinations(boxes, 2):
        assert not one.overlaps(two)
    axes = figure.axes[0]
    title = next(text for text in axes.findobj(Text) if text.get_text() == axes.get_title(loc="left"))
    others = [box(figure, text) for text in (*axes.get_xticklabels(), title)]
    for one in boxes:
        assert one.x0 >= axes.get_window_extent().x0
        assert one.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= one.y0 <= one.y1 <= figure.bbox.y1
        assert not any(one.overlaps(other) for other in others)


def test_a_label_stands_clear_of_the_lines(draw):
    figure = draw(short=[0.2, 0.3, 0.4], long=[0.2, 0.3, 0.35, 0.4, 0.42])
    ends = max(line.get_window_extent(FigureCanvasAgg(figure).get_renderer()).x1 for line in figure.axes[0].lines)
    for text in labels(figure):
        # The annotation's box includes no arrow: it is the text alone.
        assert box(figure, text).x0 >= ends - 3


@pytest.mark.parametrize("length", [30, 60, 200])
def test_a_long_name_stays_inside_and_leaves_room_for_the_lines(draw, length):
    figure = draw(**{"n" * length: [0.2, 0.4, 0.6]})
    (text,) = labels(figure)
    assert box(figure, text).x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().width > 0.3 * figure.bbox.width


def test_depths_are_named_by_layer(draw):
    axes = draw(one=[0.1, 0.2, 0.3, 0.4]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["embed", "1", "2", "norm"]
    assert axes.get_xticks().tolist() == [0, 1, 2, 3]


def test_where_depths_differ_the_norm_has_no_name_of_its_own(draw):
    axes = draw(one=[0.1, 0.2, 0.3], two=[0.1, 0.2, 0.3, 0.4, 0.5]).axes[0]
    named = dict(zip(axes.get_xticks().tolist(), (text.get_text() for text in axes.get_xticklabels()), strict=True))
    assert named[0] == "embed"
    assert "norm" not in named.values()
    assert all(text == str(depth) for depth, text in named.items() if depth)


@pytest.mark.parametrize("blocks", [4, 12, 13, 24, 48])
def test_tick_labels_of_deep_models_do_not_overlap(draw, blocks):
    figure = draw(one=np.linspace(0.2, 0.9, blocks + 2).tolist())
    boxes = [box(figure, tick) for tick in figure.axes[0].get_xticklabels()]
    for one, two in combinations(boxes, 2):
        assert not one.overlaps(two)


def test_the_title_says_how_many_images(draw, analysis_table):
    assert "over 8 images" in draw(one=[0.1, 0.2, 0.3]).axes[0].get_title(loc="left")
    tables = [analysis_table([0.1, 0.2, 0.3], images=count) for count in (8, 20)]
    assert "8 to 20 images" in plot_similarity(tables, ["one", "two"]).axes[0].get_title(loc="left")


def test_random_weights_are_a_thin_dashed_line(analysis_table):
    table = analysis_table([0.5, 0.6, 0.7])
    reference = table[table["metric"] == "similarity"].assign(metric="similarity_random", mean=[0.1, 0.2, 0.3])
    figure = plot_similarity([pd.concat([table, reference])], ["one"])
    line, dashed = figure.axes[0].lines
    assert dashed.get_ydata().tolist() == [0.1, 0.2, 0.3]
    assert dashed.get_linewidth() < line.get_linewidth()
    assert dashed.get_linestyle() == "--"
    assert "random weights" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_the_first_layer_of_a_stage_has_a_ring(analysis_table):
    table = analysis_table([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    table["tokens"] = table["depth"].map(dict(enumerate([64, 64, 16, 16, 4, 4])))
    _, rings = plot_similarity([table], ["one"]).axes[0].lines
    assert rings.get_xdata().tolist() == [2, 4]
    assert rings.get_ydata().tolist() == [0.3, 0.5]


def test_what_is_drawn_is_the_data(draw):
    data = draw(one=[0.1, 0.2, 0.3], two=[0.4, 0.5, 0.6]).data
    assert data["run"].tolist() == ["one"] * 3 + ["two"] * 3
    assert data["mean"].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert set(data["metric"]) == {"similarity"}


def test_a_name_that_had_to_move_is_led_to_its_line(draw):
    leaders = draw(one=[0.5, 0.5, 0.5], two=[0.5, 0.5, 0.51]).axes[0].findobj(ConnectionPatch)
    assert [leader.xy1[1] for leader in leaders] == [0.5, 0.51]


def test_twelve_models_look_different(draw):
    lines = draw(**{f"model-{number}": [0.1, 0.1, number / 12] for number in range(12)}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 12
