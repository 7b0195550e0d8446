"""What the terms do in each experiment: the numbers against scipy, and the pages against the tables of results."""

import math

import pandas as pd
import pytest
from effects import CONTROLS, HERE, control_of, effect, effects, markdown, rows_of, summary_of, table_of, written
from scipy import stats

ACCURACY, P, RANK = range(3)


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
    assert rows["paper"].values[ACCURACY] == pytest.approx({"1": 71.1, "2": 74.1, "3": 79.1})


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
    assert list(rows["paper"].values[ACCURACY]) == ["1", "3"]
    assert list(rows["cutmix"].values[RANK]) == ["2", "3"]
    assert effect(rows["cutmix"], rows["none"], RANK).n == 2
    assert effect(rows["cutmix"], rows["none"], P).n == 3
    assert effect(rows["paper"], rows["none"], P).n == 2


def test_the_table_and_the_figure_are_those_of_the_results():
    found = effects()
    written = pd.read_csv(HERE / "effects.csv")
    pd.testing.assert_frame_equal(found, written, check_dtype=False, rtol=1e-4, atol=1e-4)
    assert markdown(summary_of(written)) in (HERE / "README.md").read_text(encoding="utf-8")


def test_the_pages_have_the_tables_of_their_results():
    names = [*(f"ablation/results{part}" for part in ("", "-mixing", "-long", "-photos")), "depth/results-widths"]
    names += ["depth/results", "digits/results", "remedies/results", "transfer/results", "transfer/results-pretrain"]
    for file in (HERE / f"{name}.csv" for name in names):
        assert markdown(table_of(pd.read_csv(file))) in file.with_name("README.md").read_text(encoding="utf-8"), file


def test_the_front_page_has_numbers_of_the_table():
    table = markdown(summary_of(pd.read_csv(HERE / "effects.csv")))
    (line,) = [line for line in table.splitlines() if "CIFAR-100, 10 classes, paper" in line]
    plain, gain = [cell.strip() for cell in line.split("|")][4:6]
    page = (HERE.parent / "README.md").read_text("utf-8")
    assert f"{plain} % and {gain.replace('+', '')} points more" in page


@pytest.mark.parametrize("kind", ["camvid-frozen", "camvid-finetuned", "scenes-frozen", "scenes-finetuned"])
def test_the_page_has_the_numbers_of_the_segmentations(kind):
    results = pd.read_csv(HERE / "segmentation" / f"results-{kind}.csv")
    lines = (HERE / "segmentation" / "README.md").read_text("utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line[:3] == "| [" and f"(results-{kind}.csv)" in line)
    rows = list(rows_of(results))
    for line, row in zip(lines[first:], rows, strict=False):
        cells = results[results["variant"] == row.variant]
        cells = cells[cells["optim.lr"] == row.rate] if "optim.lr" in cells else cells
        parts = [100 * cells[name] for name in ("miou", "accuracy", "accuracy_mean")]
        shares = [f"{part.mean():.1f} ± {part.std():.1f}" for part in parts]
        differences = [written(effect(row, control_of(row, name, rows), 0), 1) for name in CONTROLS]
        told = [row.variant, shares[0], *differences, *shares[1:], f"{cells['similarity_last'].mean():.2f}"]
        assert line.endswith(f"| {' | '.join(told)} |")
