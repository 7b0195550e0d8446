import pandas as pd
import pytest

from pdvit.plots.ablation import summarise
from pdvit.plots.sweep import NOTHING, markdown, notes_of, plot_sweep, rows_of

VALUES = {"none": [0.50, 0.52, 0.54], "paper": [0.60, 0.61, 0.65]}


def sweep(metric: str = "accuracy", **change: object):
    rows = [
        {"cell": f"{at}", "status": "finished", "diversity.preset": preset, "run.seed": f"{seed}", metric: f"{value}"}
        for at, (preset, seed, value) in enumerate((p, s, v) for p in VALUES for s, v in enumerate(VALUES[p]))
    ]
    rows[-1] |= change
    return summarise(pd.DataFrame(rows, dtype=object), metric)


def test_dots_are_seeds_and_marks_their_means():
    left, right = plot_sweep(sweep(), "mine").axes
    dots = [line for line in left.lines if line.get_alpha() == 0.5]
    for values, line in zip(VALUES.values(), dots, strict=True):
        assert line.get_xdata().tolist() == pytest.approx([100 * value for value in values])
    assert [bars.lines[0].get_xdata()[0] for bars in left.containers] == pytest.approx([52, 62])
    (difference,) = right.containers
    assert difference.lines[0].get_xdata()[0] == pytest.approx(10)
    (segment,) = difference.lines[2][0].get_segments()
    summary = sweep().table.iloc[1]
    assert segment[:, 0].tolist() == pytest.approx([100 * summary["low"], 100 * summary["high"]])
    assert [text.get_text() for text in left.get_yticklabels()] == ["none", "paper"]


def test_the_data_are_the_table():
    assert plot_sweep(sweep(), "mine").data.equals(sweep().table)


def test_the_table_in_words():
    head, none, paper = rows_of(sweep())
    assert head == ["diversity.preset", "n", "accuracy, %", "difference, points [95 %]"]
    assert none == ["none", "3", "52.0 ± 2.0", NOTHING]
    assert paper == ["paper", "3", "62.0 ± 2.6", "+10.0 [+7.5, +12.5]"]


def test_a_metric_that_is_no_share_stays_as_it_is():
    head, none, _ = rows_of(sweep("loss"))
    assert (head[2], none[2]) == ("loss", "0.520 ± 0.020")


def test_cells_that_failed_are_said():
    failed = sweep(status="failed")
    assert "1 of 6 cells are not in these numbers: cell 5 (failed)" in notes_of(failed)
    assert rows_of(failed)[2][1] == "2"
    assert [text.get_text() for text in plot_sweep(failed, "mine").axes[0].get_yticklabels()][1] == "paper (n = 2)"


def test_markdown_keeps_names_from_being_markup():
    page = markdown(sweep(**{"diversity.preset": "a|b_<c>"}))
    assert page.startswith("| diversity.preset | n |")
    assert r"a\|b\_\<c\>" in page


def test_settings_without_any_number_are_drawn():
    table = sweep(status="failed")
    table.table.loc[1, ["n", "mean", "std", "difference", "low", "high"]] = [0, *[float("nan")] * 5]
    plot_sweep(table, "mine")
