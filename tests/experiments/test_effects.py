"""What the terms do in each experiment, against scipy."""

import math

import pandas as pd
import pytest
from effects import control_of, effect, report, rows_of
from scipy import stats

ACCURACY, P, RANK = "accuracy", "similarity_norm", "rank_norm"


def results(**changed: object) -> pd.DataFrame:
    """Two rates for each of four variants, three seeds; the higher rate is better on validation, but for `none`."""
    rows = [
        {"variant": variant, "run.seed": seed, "optim.lr": rate, "status": "finished"}
        | {"accuracy": 0.5 + 0.1 * place + 0.01 * seed**2 + 0.001 * high, "similarity_norm": 0.7 - 0.2 * place}
        | {"accuracy_val": 0.5 + 0.1 * (high != (variant == "none")), "rank_norm": 5.0 + place + seed * place}
        for place, variant in enumerate(("none", "cutmix", "paper", "cosine-plain"))
        for seed in (1, 2, 3)
        for high, rate in enumerate((0.001, 0.002))
    ]
    return pd.DataFrame(rows).assign(**changed)


def test_each_variant_has_its_best_rate_on_validation_and_its_test_accuracy_at_that():
    rows = {row.variant: row for row in rows_of(results())}
    assert [row.rate for row in rows.values()] == [0.001, 0.002, 0.002, 0.002]
    assert rows["paper"].values(ACCURACY) == pytest.approx({"1": 71.1, "2": 74.1, "3": 79.1})


def test_an_effect_is_the_paired_difference_of_scipy():
    rows = list(rows_of(results()))
    none, _, paper, plain = rows
    seen = effect(paper, control_of(paper, "none", rows), RANK)
    shares = [100 * (2 + 2 * s) / 5 for s in (1, 2, 3)]  # of none's 5, in percent
    expected = stats.ttest_1samp(shares, 0).confidence_interval(0.95)
    assert (seen.mean, seen.low, seen.high) == pytest.approx((120.0, expected.low, expected.high))
    similar = effect(paper, control_of(paper, "none", rows), P)
    assert (similar.mean, similar.low, similar.high) == pytest.approx((-0.4, -0.4, -0.4))
    assert effect(paper, control_of(paper, "cutmix", rows), ACCURACY).mean == pytest.approx(10)  # points
    assert control_of(plain, "none", rows) is none
    assert control_of(none, "none", rows) is None


def test_what_failed_or_was_not_measured_is_not_in_the_numbers():
    table = results().drop(columns="optim.lr").drop_duplicates(["variant", "run.seed"])
    table.loc[(table["variant"] == "paper") & (table["run.seed"] == 2), "status"] = "failed"
    table.loc[(table["variant"] == "cutmix") & (table["run.seed"] == 1), "rank_norm"] = math.nan
    rows = {row.variant: row for row in rows_of(table)}
    assert list(rows["paper"].values(ACCURACY)) == ["1", "3"]
    assert list(rows["cutmix"].values(RANK)) == ["2", "3"]
    assert effect(rows["cutmix"], rows["none"], RANK).n == 2
    assert effect(rows["cutmix"], rows["none"], P).n == 3
    assert effect(rows["paper"], rows["none"], P).n == 2


def test_numbers_are_printed_of_the_runs_that_are_asked_for(tmp_path):
    file = str(tmp_path / "results.csv")
    results().to_csv(file, index=False)
    low, high = stats.ttest_1samp([80, 120, 160], 0).confidence_interval(0.95)
    assert report(file, "paper", RANK, "none") == f"+120 [+{low:.0f}, +{high:.0f}]"
    assert report(file, "none", P, "paper") == "+0.40 [+0.40, +0.40]"
    assert report(file, "none", ACCURACY) == "54.7"
    assert report(file, "none", ACCURACY, "optim.lr=0.002") == "54.8"
    assert "| paper | 0.002 | 3 | 74.8 ± 4.0 | +20.1 [+20.1, +20.1] | +10.0 [+10.0, +10.0] |" in report(file)
    assert "| paper | 0.001 | 3 | 74.7 ± 4.0 | +20.0 [" in report(file, "optim.lr=0.001")
    with pytest.raises(ValueError, match="0 rows of cosine"):
        report(file, "cosine", ACCURACY)
