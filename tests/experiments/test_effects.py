"""What the terms do in each experiment: the numbers against scipy, and the pages against the tables of results."""

import math
import sys
from statistics import mean, stdev

import pandas as pd
import pytest
from effects import (
    CONTROLS,
    HERE,
    MEASURES,
    control_of,
    draw,
    effect,
    effects,
    main,
    markdown,
    questions_of,
    rows_of,
    summary_of,
    table_of,
    written,
)
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
    table = results().drop(columns="optim.lr").drop_duplicates(["variant", "run.seed"])
    table.loc[(table["variant"] == "paper") & (table["run.seed"] == 2), "status"] = "failed"
    table.loc[(table["variant"] == "cutmix") & (table["run.seed"] == 1), "rank_norm"] = math.nan
    rows = {row.variant: row for row in rows_of(table)}
    assert list(rows["paper"].values[ACCURACY]) == ["1", "3"]
    assert list(rows["cutmix"].values[RANK]) == ["2", "3"]
    assert effect(rows["cutmix"], rows["none"], RANK).pairs == 2
    assert effect(rows["cutmix"], rows["none"], P).pairs == 3
    assert effect(rows["paper"], rows["none"], P).pairs == 2


def test_a_rate_at_which_a_run_failed_is_not_taken_and_without_another_there_are_no_numbers():
    table = results()
    high = (table["variant"] == "paper") & (table["optim.lr"] == 0.002) & (table["run.seed"] == 2)
    table.loc[high, "status"] = "failed"
    rows = {row.variant: row for row in rows_of(table)}
    assert (rows["paper"].rate, len(rows["paper"].values[ACCURACY])) == (0.001, 3)
    table.loc[(table["variant"] == "paper") & (table["run.seed"] == 1), "status"] = "failed"
    assert {row.variant: len(row.values[ACCURACY]) for row in rows_of(table)}["paper"] == 0


def test_without_a_column_there_is_no_number():
    table = results().drop(columns=["rank_norm", "optim.lr"])
    head, *body = table_of(table)
    assert not any("rank" in name for name in head)
    assert (head[:3], body[0][:2]) == (["", "n", "accuracy, %"], ["none", "3"])


def test_of_one_table_every_variant_that_is_no_control_is_asked_for(tmp_path, monkeypatch):
    table = results()
    family = table[table["variant"] != "cosine-plain"].assign(variant=lambda rows: "probe-" + rows["variant"])
    deep = pd.concat([table, family]).assign(**{"model.depth": 24})
    pd.concat([deep, deep.assign(**{"model.depth": 6})]).to_csv(tmp_path / "results.csv", index=False)
    asked = questions_of(str(tmp_path / "results.csv"))
    names = ["paper", "cosine-plain", "probe-paper"]
    assert {question.setting for question in asked} == {f"{depth} {name}" for depth in (6, 24) for name in names}
    found = effects(asked)
    paper = found[(found["setting"] == "24 paper") & (found["minus"] == "none") & (found["measure"] == "P")]
    assert paper["effect"].item() == pytest.approx(-0.4)
    monkeypatch.setattr(sys, "argv", ["effects.py", str(tmp_path / "results.csv"), str(tmp_path / "effects.png")])
    assert main() == 0
    assert (tmp_path / "effects.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [["--help"], ["nothing/results.csv"], ["depth/layers.csv"]])
def test_what_is_no_table_of_results_shows_the_help(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["effects.py", *words])
    assert main() == 2
    assert "effects.py [FILE [FIGURE]]" in capsys.readouterr().out


def test_a_table_without_both_controls_has_no_effects_to_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["effects.py", "ablation/results-mixing.csv", str(tmp_path / "effects.png")])
    assert main() == 2
    assert "no variant beside both controls" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_the_table_and_the_figure_are_those_of_the_results():
    found = effects()
    written = pd.read_csv(HERE / "effects.csv")
    pd.testing.assert_frame_equal(found, written, check_dtype=False, rtol=1e-4, atol=1e-4)
    assert markdown(summary_of(written)) in (HERE / "README.md").read_text(encoding="utf-8")
    bars = [bar.lines[2][0].get_segments()[0] for bar in draw(found).axes[1].containers]
    rows = found[found["measure"] == "P"]
    assert [bar[:, 0].tolist() for bar in bars] == [
        pytest.approx(pair) for pair in zip(rows["low"], rows["high"], strict=True)
    ]
    places = [bar[0, 1] for bar in bars]
    assert len(set(places)) == len(places)
    figure = draw(found)
    assert [axes.get_xlabel() for axes in figure.axes] == ["accuracy or mIoU, points", "P", "effective rank, %"]
    assert len(figure.axes[0].containers) == len(found[found["measure"] == MEASURES[0].name])


TABLES = (
    *(
        "ablation/results.csv",
        "ablation/results-mixing.csv",
        "ablation/results-long.csv",
        "ablation/results-photos.csv",
        "depth/results.csv",
        "depth/results-widths.csv",
        "digits/results.csv",
        "remedies/results.csv",
    ),
    *("transfer/results.csv", "transfer/results-pretrain.csv"),
)


@pytest.mark.parametrize("table", TABLES)
def test_the_pages_have_the_tables_of_their_results(table):
    text = (HERE / table).with_name("README.md").read_text(encoding="utf-8")
    assert markdown(table_of(pd.read_csv(HERE / table))) in text


def test_the_front_page_has_the_numbers_of_the_smoke_test():
    rows = list(rows_of(pd.read_csv(HERE / "digits" / "results.csv")))
    page = (HERE.parent / "README.md").read_text("utf-8")
    flags = {"none": "none`", "cutmix": "cutmix` (control)"}
    flags |= {"cosine-plain": "none --cosine 1`", "paper": "paper` (default)"}
    for row in rows:
        accuracy, similarity = ([*row.values[number].values()] for number in (0, 1))
        told = f"{mean(accuracy):.1f} ± {stdev(accuracy):.1f} | {mean(similarity):.2f} ± {stdev(similarity):.2f} |"
        start = f"| `--diversity {flags[row.variant]} |"
        assert any(line.startswith(start) and line.endswith(told) for line in page.splitlines())
    paper = next(row for row in rows if row.variant == "paper")
    for name in CONTROLS:
        mean_and_interval = written(effect(paper, control_of(paper, name, rows), 0), 1)
        assert mean_and_interval.replace("+", "") in page


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
