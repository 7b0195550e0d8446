import math

import pytest

from pdvit.plots.attention import NEEDED, plot_attention
from pdvit.plots.reading import read_analysis, read_curves


@pytest.fixture
def figure(tmp_path, analysis_folder):
    run = analysis_folder(tmp_path / "run")
    arrays = read_curves(run, "attention", NEEDED)
    drawn = plot_attention([arrays, arrays], [read_analysis(run)] * 2, ["one", "two"])
    drawn.expected = arrays
    return drawn


def test_every_head_is_a_dot_and_their_mean_a_line(figure):
    for axes, curve in zip(figure.axes, NEEDED, strict=True):
        heads, mean = axes.lines[:2]
        expected = [figure.expected[f"{curve}/block {block}"].tolist() for block in (1, 2, 3)]
        assert heads.get_ydata().tolist() == [head for values in expected for head in values]
        assert mean.get_ydata().tolist() == pytest.approx([sum(values) / 2 for values in expected])
        assert mean.get_xdata().tolist() == [1, 2, 3]


def test_heads_of_two_runs_stand_beside_one_another(figure):
    first, second = figure.axes[0].lines[0], figure.axes[0].lines[2]
    assert (second.get_xdata() > first.get_xdata()).all()


def test_uniform_attention_is_marked(figure):
    assert any(line.get_ydata()[0] == pytest.approx(math.log(16)) for line in figure.axes[0].lines)


def test_the_data_are_all_heads(figure):
    rows = figure.data[(figure.data["run"] == "one") & (figure.data["curve"] == "distance")]
    assert rows[rows["layer"] == "block 2"]["value"].tolist() == figure.expected["distance/block 2"].tolist()
    assert rows["head"].tolist() == [1, 2] * 3
