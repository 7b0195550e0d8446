import pandas as pd
import pytest
from figures import draw_layers
from scipy import stats

from pdvit.plots.style import render


def layers() -> pd.DataFrame:
    rows = [
        {"variant": variant, "model.depth": depth, "run.seed": seed, "when": when, "layer": f"layer {at}", "depth": at}
        | {"similarity": 0.1 * at / depth + 0.01 * seed**2 + (when == "after") * 0.2, "effective_rank": 5.0 - seed}
        for variant in ("none", "paper")
        for depth in (2, 4)
        for seed in range(3)
        for when in ("after", "before")
        for at in range(depth + 2)
    ]
    return pd.DataFrame(rows)


def test_a_figure_has_a_panel_for_each_depth_and_a_line_for_each_variant_after_and_before():
    figure = draw_layers(layers())
    assert [axes.get_title("left") for axes in figure.axes[:2]] == ["depth 2", "depth 4"]
    assert all(len(axes.lines) == 3 for axes in figure.axes)  # all begin alike
    assert {line.get_linestyle() for line in figure.axes[0].lines} == {"-", "--"}
    assert all(min(line.get_xdata()) == 0 and max(line.get_xdata()) == 1 for line in figure.axes[1].lines)
    assert render(figure, ".svg") == render(draw_layers(layers()), ".svg")


def test_its_numbers_are_means_over_seeds_with_the_interval_of_scipy():
    data = draw_layers(layers()).data
    row = data[(data["panel"] == "depth 4") & (data["variant"] == "paper") & (data["when"] == "after")]
    row = row[(row["metric"] == "similarity") & (row["layer"] == "layer 2")].iloc[0]
    seeds = [0.25, 0.26, 0.29]
    expected = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((sum(seeds) / 3, expected.low, expected.high))
    assert (row["depth"], row["n"]) == (0.4, 3)
