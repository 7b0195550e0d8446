import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pdvit.errors import UserError
from pdvit.plots.sweep import NOTHING, axes_of, markdown, paired, plot_sweep, read_cells, summarise, table_of, text_of

PRESETS = {"none": [0.50, 0.52, 0.54], "paper": [0.60, 0.61, 0.65]}


def cells(rows: list[dict[str, object]]) -> pd.DataFrame:
    """A table of cells as it is read: everything text."""
    whole = [{"cell": at, "variant": "", "status": "finished", "seconds": 9.5, **row} for at, row in enumerate(rows)]
    return pd.DataFrame(whole).astype(str).astype(object)


def presets(metric: str = "accuracy", **more: object) -> list[dict[str, object]]:
    return [
        {"diversity.preset": preset, "run.seed": seed, metric: value, **more}
        for preset, values in PRESETS.items()
        for seed, value in enumerate(values)
    ]


def summary(metric: str = "accuracy", **last: object):
    """A sweep over presets, whose last cell may be another."""
    rows = presets(metric)
    rows[-1] |= last
    return summarise(cells(rows), metric)


def row_of(table: pd.DataFrame, setting: str) -> pd.Series:
    (row,) = [row for _, row in table.iterrows() if row["setting"] == setting]
    return row


def test_seeds_of_both_are_paired_and_one_pair_has_no_interval():
    found = paired({"0": 1.0, "1": 2.0, "2": 9.0}, {"1": 3.0, "0": 1.5, "7": 100.0})
    assert (found.mean, found.n) == (0.75, 2)
    one, none = paired({"0": 1.0}, {"0": 2.0}), paired({}, {})
    assert (one.mean, one.n, none.n) == (1.0, 1, 0)
    assert all(math.isnan(value) for value in (one.std, one.low, one.high, none.mean, none.std, none.low))


def test_mean_spread_and_differences_are_over_seeds():
    table = summarise(cells(presets()[::-1]), baseline="none").table  # in any order
    for name, values in PRESETS.items():
        row = row_of(table, name)
        assert row[["n", "mean", "std"]].tolist() == pytest.approx([3, np.mean(values), np.std(values, ddof=1)])
        assert [row[f"seed {seed}"] for seed in range(3)] == values
    expected = stats.ttest_rel(PRESETS["paper"], PRESETS["none"]).confidence_interval(0.95)
    assert row_of(table, "paper")[["low", "high", "pairs"]].tolist() == pytest.approx([expected.low, expected.high, 3])


def test_the_first_setting_is_the_baseline_unless_one_is_named():
    assert math.isnan(row_of(summary().table, "none")["difference"])
    table = summarise(cells(presets()), baseline="diversity.preset=paper").table
    assert row_of(table, "none")["difference"] == pytest.approx(-0.1)
    rows = [{"optim.lr": rate, "run.seed": seed, "accuracy": 0.5} for rate in ("0.001", "0.002") for seed in (0, 1)]
    assert summarise(cells(rows), baseline="optim.lr=2e-3").baseline == "optim.lr=0.002"


def test_a_crossed_sweep_compares_like_with_like():
    rows = [row for depth in (6, 12) for row in presets(**{"model.depth": depth})]
    for row in rows:
        row["accuracy"] = float(row["accuracy"]) - (0.3 if row["model.depth"] == 12 else 0)
    found = summarise(cells(rows))
    assert found.axes == ["diversity.preset", "model.depth"]
    assert found.baseline == "diversity.preset=none"
    differences = [row_of(found.table, f"preset paper, depth {depth}")["difference"] for depth in (6, 12)]
    assert differences == pytest.approx([0.1, 0.1])


def test_what_a_variant_decides_is_no_axis_of_its_own():
    rows = [{"variant": name, "model.depth": depth, "optim.lr": lr, "run.seed": 0, "accuracy": 0.5}
            for name, depth in (("small", 6), ("large", 12)) for lr in (0.1, 0.2)]  # fmt: skip
    assert axes_of(cells(rows)) == ["variant", "optim.lr"]


def test_cells_without_a_number_are_counted_and_named():
    rows = presets()
    rows[1] |= {"status": "failed"}
    rows[5] |= {"accuracy": "nan"}
    found = summarise(cells(rows))
    assert "2 of 6 cells are not in these numbers: cell 1 (failed), cell 5 (no accuracy)" in found.notes
    assert row_of(found.table, "none")[["n", "left_out", "mean"]].tolist() == [2, 1, 0.52]
    assert row_of(found.table, "paper")["pairs"] == 1


def test_a_setting_of_which_no_cell_finished_stays_in_table_and_figure():
    rows = [row | ({"status": "diverged"} if row["diversity.preset"] == "paper" else {}) for row in presets()]
    found = summarise(cells(rows))
    assert row_of(found.table, "paper")[["n", "left_out"]].tolist() == [0, 3]
    assert table_of(found)[2] == ["paper", "0", NOTHING, NOTHING]
    left, right = plot_sweep(found, "mine").axes
    marks = [bars.lines[0].get_xdata()[0] for axes in (left, right) for bars in axes.containers]
    assert np.isfinite(marks).tolist() == [True, False, False, False]


def test_a_single_setting_has_no_differences():
    found = summarise(cells(presets()[:3]))
    assert (found.axes, found.baseline) == ([], "")
    assert found.table["setting"].tolist() == ["all"]
    assert len(plot_sweep(found, "mine").axes) == 1


def test_another_metric_can_be_named_and_miou_is_compared_where_there_is_no_accuracy():
    assert summary("similarity_last").table["mean"].tolist() == pytest.approx([0.52, 0.62])
    assert summarise(cells(presets("miou"))).metric == "miou"


def test_a_metric_or_baseline_that_is_not_there_and_two_cells_of_one_setting_and_seed_are_refused():
    for baseline, tip in (("diversity.preset=papr", "paper"), ("model.depth=3", "diversity.preset"), ("papr", "paper")):
        with pytest.raises(UserError, match=f"tip: .*{tip}"):
            summarise(cells(presets()), baseline=baseline)
    with pytest.raises(UserError, match=r"tip: .*accuracy"):
        summarise(cells(presets()), "accurac")
    with pytest.raises(UserError, match=r"diversity\.preset=none and seed 0"):
        summarise(cells([*presets(), presets()[0]]))


def test_values_stay_as_they_are_written(tmp_path):
    (tmp_path / "cells.csv").write_text("cell,status,optim.lr,accuracy\n0,finished,1e-3,0.5\n1,finished,NA,0.6\n")
    assert summarise(read_cells(tmp_path)).table["setting"].tolist() == ["1e-3", "NA"]


def test_dots_are_seeds_and_marks_their_means():
    figure = plot_sweep(summary(), "mine")
    left, right = figure.axes
    dots = [line for line in left.lines if line.get_alpha() == 0.5]
    for values, line in zip(PRESETS.values(), dots, strict=True):
        assert line.get_xdata().tolist() == pytest.approx([100 * value for value in values])
    assert [bars.lines[0].get_xdata()[0] for bars in left.containers] == pytest.approx([52, 62])
    _, difference = right.containers  # that of the baseline is empty
    assert difference.lines[0].get_xdata()[0] == pytest.approx(10)
    (segment,) = difference.lines[2][0].get_segments()
    assert segment[:, 0].tolist() == pytest.approx([100 * figure.data.loc[1, end] for end in ("low", "high")])
    assert [text.get_text() for text in left.get_yticklabels()] == ["none", "paper"]
    failed = plot_sweep(summary(status="failed"), "mine")
    assert [text.get_text() for text in failed.axes[0].get_yticklabels()] == ["none (n = 3)", "paper (n = 2)"]


def test_the_table_in_words():
    head, none, paper = table_of(summary())
    assert head == ["diversity.preset", "n", "accuracy, %", "difference, points [95 %]"]
    assert none == ["none", "3", "52.0 ± 2.0", NOTHING]
    assert paper == ["paper", "3", "62.0 ± 2.6", "+10.0 [+7.5, +12.5]"]
    assert text_of(summary()).splitlines()[2] == "paper             3  62.0 ± 2.6   +10.0 [+7.5, +12.5]"
    head, none, _ = table_of(summary("loss"))
    assert (head[2], none[2]) == ("loss", "0.520 ± 0.020")


def test_markdown_keeps_names_from_being_markup():
    assert r"a\|b\_\<c\>" in markdown(summary(**{"diversity.preset": "a|b_<c>"}))
