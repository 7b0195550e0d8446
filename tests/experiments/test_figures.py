import sys

import pandas as pd
import pytest
from effects import at_best_rates
from figures import draw_layers, main
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


def test_without_crossed_settings_there_is_one_panel_and_one_seed_has_no_band():
    rows = layers()
    figure = draw_layers(rows[(rows["model.depth"] == 2) & (rows["run.seed"] == 0)])
    assert len(figure.axes) == 2
    assert figure.data["low"].isna().all()


def test_what_begins_alike_has_one_line_and_what_does_not_a_line_of_its_own_colour():
    same, rows = draw_layers(layers()).axes[0].lines, layers()
    dashed = [line for line in same if line.get_linestyle() == "--"]
    assert len(dashed) == 1
    assert dashed[0].get_color() not in {line.get_color() for line in same if line is not dashed[0]}
    rows["similarity"] += (rows["variant"] == "paper") * 0.1
    lines = draw_layers(rows).axes[0].lines
    colours = [[line.get_color() for line in lines if line.get_linestyle() == style] for style in ("--", "-")]
    assert (len(colours[0]), colours[0]) == (2, colours[1])


def test_where_rates_were_crossed_each_variant_has_its_best_on_validation_at_each_depth():
    parts = [layers().assign(**{"optim.lr": rate}) for rate in (0.001, 0.002)]
    table = pd.concat(parts, ignore_index=True)
    table["similarity"] += (table["optim.lr"] == 0.002) * 10
    results = table.drop_duplicates(["variant", "model.depth", "run.seed", "optim.lr"]).assign(status="finished")
    high = (results["variant"] == "paper") & (results["model.depth"] == 4)
    results["accuracy_val"] = 0.5 + 0.1 * ((results["optim.lr"] == 0.002) == high)
    data = draw_layers(at_best_rates(table, results)).data
    means = data[(data["metric"] == "similarity") & (data["when"] == "after")].groupby(["panel", "variant"])["mean"]
    assert {key for key, mean in means.min().items() if mean > 10} == {("depth 4", "paper")}
    assert data["n"].eq(3).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "figures.py ablation/layers.csv"),
        (["--help"], "figures.py ablation/layers.csv"),
        (["depth/results.csv"], "figures.py ablation/layers.csv"),
        (["depth/layers.csv", "nonee", "paper"], "no variant nonee in depth/layers.csv: it has none, cutmix, paper"),
    ],
)
def test_what_can_not_be_drawn_is_said_and_no_figure_is_replaced(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures.py", *words])
    monkeypatch.setattr("figures.render", None)
    assert main() == 2
    assert said in capsys.readouterr().out
