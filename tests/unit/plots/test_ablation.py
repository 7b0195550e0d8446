import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pdvit.errors import UserError
from pdvit.plots.ablation import axes_of, read_cells, summarise

PRESETS = {"none": [0.50, 0.52, 0.54], "paper": [0.60, 0.61, 0.65]}


def cells(rows: list[dict[str, object]]) -> pd.DataFrame:
    """A table of cells as it is read: everything text."""
    whole = [{"cell": at, "variant": "", "status": "finished", "seconds": 9.5, **row} for at, row in enumerate(rows)]
    return pd.DataFrame(whole).astype(str).astype(object)


def presets(**more: object) -> list[dict[str, object]]:
    return [
        {"diversity.preset": preset, "run.seed": seed, "accuracy": value, **more}
        for preset, values in PRESETS.items()
        for seed, value in enumerate(values)
    ]


def row_of(table: pd.DataFrame, setting: str) -> pd.Series:
    (row,) = [row for _, row in table.iterrows() if row["setting"] == setting]
    return row


def test_mean_and_spread_are_over_seeds():
    table = summarise(cells(presets())).table
    for name, values in PRESETS.items():
        row = row_of(table, name)
        assert (row["n"], row["mean"]) == (3, pytest.approx(np.mean(values)))
        assert row["std"] == pytest.approx(np.std(values, ddof=1))
        assert [row[f"seed {seed}"] for seed in range(3)] == values


def test_differences_are_paired_by_seed_as_scipy_does():
    rows = presets()[::-1]  # in any order
    row = row_of(summarise(cells(rows), baseline="none").table, "paper")
    expected = stats.ttest_rel(PRESETS["paper"], PRESETS["none"]).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["pairs"] == 3


def test_the_first_setting_is_the_baseline_unless_one_is_named():
    assert math.isnan(row_of(summarise(cells(presets())).table, "none")["difference"])
    table = summarise(cells(presets()), baseline="diversity.preset=paper").table
    assert row_of(table, "none")["difference"] == pytest.approx(-0.1)


def test_a_crossed_sweep_compares_like_with_like():
    rows = [row for depth in (6, 12) for row in presets(**{"model.depth": depth})]
    for row in rows:
        row["accuracy"] = float(row["accuracy"]) - (0.3 if row["model.depth"] == 12 else 0)
    summary = summarise(cells(rows))
    assert summary.axes == ["diversity.preset", "model.depth"]
    assert summary.baseline == "diversity.preset=none"
    differences = [row_of(summary.table, f"preset paper, depth {depth}")["difference"] for depth in (6, 12)]
    assert differences == pytest.approx([0.1, 0.1])


def test_what_a_variant_decides_is_no_axis_of_its_own():
    rows = [{"variant": name, "model.depth": depth, "optim.lr": lr, "run.seed": 0, "accuracy": 0.5}
            for name, depth in (("small", 6), ("large", 12)) for lr in (0.1, 0.2)]  # fmt: skip
    assert axes_of(cells(rows)) == ["variant", "optim.lr"]


def test_cells_that_did_not_finish_are_counted_and_named():
    rows = presets()
    rows[1] |= {"status": "failed", "accuracy": ""}
    rows[5] |= {"accuracy": "nan"}
    summary = summarise(cells(rows))
    assert summary.left_out == ["cell 1 (failed)", "cell 5 (no accuracy)"]
    assert summary.cells == 6
    assert row_of(summary.table, "none")[["n", "left_out"]].tolist() == [2, 1]
    assert row_of(summary.table, "paper")["pairs"] == 1


def test_a_setting_of_which_no_cell_finished_stays_in_the_table():
    rows = [row | ({"status": "diverged"} if row["diversity.preset"] == "paper" else {}) for row in presets()]
    row = row_of(summarise(cells(rows)).table, "paper")
    assert (row["n"], row["left_out"]) == (0, 3)
    assert math.isnan(row["mean"])


def test_a_number_of_an_unfinished_cell_does_not_count():
    rows = presets()
    rows[0]["status"] = "running"
    assert row_of(summarise(cells(rows)).table, "none")["mean"] == pytest.approx(0.53)


def test_two_cells_of_one_setting_and_seed_are_refused():
    with pytest.raises(UserError, match=r"diversity\.preset=none"):
        summarise(cells([*presets(), presets()[0]]))


def test_another_metric_can_be_named_and_a_wrong_one_is_refused():
    rows = [row | {"similarity_last": 0.3} for row in presets()]
    assert summarise(cells(rows), "similarity_last").table["mean"].tolist() == pytest.approx([0.3, 0.3])
    with pytest.raises(UserError) as caught:
        summarise(cells(rows), "similarity_lst")
    assert "similarity_last" in caught.value.tip


def test_miou_is_compared_where_there_is_no_accuracy():
    rows = [{("miou" if key == "accuracy" else key): value for key, value in row.items()} for row in presets()]
    assert summarise(cells(rows)).metric == "miou"


def test_a_number_may_be_written_otherwise():
    rows = [{"optim.lr": rate, "run.seed": seed, "accuracy": 0.5} for rate in ("0.001", "0.002") for seed in (0, 1)]
    assert summarise(cells(rows), baseline="optim.lr=2e-3").baseline == "optim.lr=0.002"


@pytest.mark.parametrize("baseline", ["diversity.preset=papr", "model.depth=3", "papr"])
def test_a_baseline_that_is_not_there_is_refused(baseline):
    with pytest.raises(UserError):
        summarise(cells(presets()), baseline=baseline)


def test_a_single_setting_has_no_differences():
    summary = summarise(cells(presets()[:3]))
    assert (summary.axes, summary.baseline) == ([], "")
    assert summary.table["setting"].tolist() == ["all"]


def test_values_stay_as_they_are_written(tmp_path):
    (tmp_path / "cells.csv").write_text("cell,status,optim.lr,accuracy\n0,finished,1e-3,0.5\n1,finished,NA,0.6\n")
    assert summarise(read_cells(tmp_path)).table["setting"].tolist() == ["1e-3", "NA"]


@pytest.mark.parametrize("content", ["", "cell\n0\n", "cell,status\n", "cell,status,a\n0\n", 'cell,status\n0,"x\n'])
def test_a_damaged_table_is_named(tmp_path, content):
    (tmp_path / "cells.csv").write_text(content)
    with pytest.raises(UserError) as caught:
        read_cells(tmp_path)
    assert "cells.csv" in caught.value.where


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        read_cells(tmp_path)
    assert "cells.csv" in caught.value.tip
