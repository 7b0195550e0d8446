"""What the terms do in each experiment: the numbers against scipy, and the pages against the tables of results."""

import math

import pandas as pd
import pytest
from effects import HERE, MEASURES, control_of, draw, effect, effects, markdown, rows_of, summary_of, table_of
from scipy import stats

ACCURACY, P, RANK = range(len(MEASURES))


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
    assert {name: row.rate for name, row in rows.items()} == {
        **{"none": 0.001, "cutmix": 0.002, "paper": 0.002, "cosine-plain": 0.002}
    }
    assert rows["paper"].values[ACCURACY] == pytest.approx({"1": 0.711, "2": 0.741, "3": 0.791})


def test_an_effect_is_the_paired_difference_of_scipy():
    rows = list(rows_of(results()))
    none, _, paper, plain = rows
    seen = effect(paper, control_of(paper, "none", rows), RANK)
    expected = stats.ttest_rel([2 + 5 + 2 * s for s in (1, 2, 3)], [5.0] * 3).confidence_interval(0.95)
    assert (seen.mean, seen.low, seen.high) == pytest.approx((6.0, expected.low, expected.high))
    assert effect(paper, control_of(paper, "cutmix", rows), ACCURACY).mean == pytest.approx(10)  # points
    assert control_of(plain, "none", rows) is none
    assert control_of(none, "none", rows) is None


def test_a_family_of_variants_has_controls_of_its_own():
    table = results()
    family = table.assign(variant="probe-" + table["variant"])
    rows = list(rows_of(pd.concat([table, family])))
    assert [control_of(row, "none", rows).variant for row in rows[5:]] == ["probe-none"] * 3


def test_settings_that_were_crossed_are_compared_alike():
    table = pd.concat([results(**{"model.depth": depth}) for depth in (6, 12)], ignore_index=True)
    table.loc[table["model.depth"] == 12, "accuracy"] += 0.1 * (table["variant"] == "paper")
    rows = list(rows_of(table))
    found = [effect(row, control_of(row, "none", rows), ACCURACY).mean for row in rows if row.variant == "paper"]
    assert found == pytest.approx([20.1, 30.1])
    head, *body = table_of(table)
    assert head[:4] == ["depth", "", "rate", "n"]
    assert [line[:2] for line in body][:5] == [*(["6", name] for name in table["variant"].unique()), ["12", "none"]]


def test_what_failed_or_was_not_measured_is_not_in_the_numbers():
    table = results()
    table.loc[(table["variant"] == "paper") & (table["run.seed"] == 2), ["status", "accuracy"]] = ["failed", math.nan]
    table.loc[(table["variant"] == "cutmix") & (table["run.seed"] == 1), "rank_norm"] = math.nan
    rows = {row.variant: row for row in rows_of(table)}
    assert list(rows["cutmix"].values[RANK]) == ["2", "3"]
    seen = effect(rows["cutmix"], rows["none"], RANK)
    assert seen.pairs == 2
    assert effect(rows["cutmix"], rows["none"], P).pairs == 3


def test_without_a_column_there_is_no_number():
    table = results().drop(columns=["rank_norm", "optim.lr"])
    head, *body = table_of(table)
    assert not any("rank" in name for name in head)
    assert (head[:3], body[0][:2]) == (["", "n", "accuracy, %"], ["none", "3"])


def test_the_table_and_the_figure_are_those_of_the_results():
    found = effects()
    written = pd.read_csv(HERE / "effects.csv")
    pd.testing.assert_frame_equal(found, written, check_dtype=False, rtol=1e-4, atol=1e-4)
    assert markdown(summary_of(written)) in (HERE / "README.md").read_text(encoding="utf-8")
    figure = draw(found)
    assert [axes.get_xlabel() for axes in figure.axes] == ["accuracy or mIoU, points", "P", "effective rank"]
    assert len(figure.axes[0].containers) == len(found[found["measure"] == MEASURES[0].name])


PAGES = {
    "ablation/README.md": ["ablation/results.csv"],
}


@pytest.mark.parametrize(("page", "tables"), PAGES.items())
def test_the_pages_have_the_tables_of_their_results(page, tables):
    text = (HERE / page).read_text(encoding="utf-8")
    for table in tables:
        assert markdown(table_of(pd.read_csv(HERE / table))) in text, table
