import pandas as pd
import pytest

from pdvit.analysis.verdict import COLLAPSED, onset, verdict


def table(*values: float, metric: str = "similarity", norm: bool = False) -> pd.DataFrame:
    names = ["embed", *(f"block {i}" for i in range(1, len(values)))]
    if norm:
        names[-1] = "norm"
    return pd.DataFrame({"layer": names, "depth": range(len(values)), "metric": metric, "mean": values})


@pytest.mark.parametrize(
    ("values", "layer"),
    [
        ((0.1, 0.2, 0.3), None),
        ((0.1, 0.6, 0.9), "block 1"),
        ((0.1, 0.2, 0.9), "block 2"),
        ((0.6, 0.7, 0.8), "embed"),
        ((0.9, 0.9, 0.4), None),  # it recovers at the end
        ((0.9, 0.4, 0.9), "block 2"),  # what came before a dip does not count
        ((0.1, 0.5, 0.5), "block 1"),  # at the limit counts
        ((0.1, 0.4999, 0.5), "block 2"),
        ((0.7,), "embed"),
    ],
)
def test_onset_is_the_first_layer_that_stays_high(values, layer):
    assert COLLAPSED == 0.5
    assert onset(table(*values)) == layer


def test_onset_goes_by_depth_and_not_by_row():
    rows = table(0.1, 0.6, 0.3, 0.7, 0.8)
    assert onset(rows.sample(frac=1, random_state=1)) == "block 3"


def test_other_metrics_do_not_count():
    rows = pd.concat([table(0.1, 0.2, 0.3), table(0.9, 0.9, 0.9, metric="similarity_signed")])
    assert onset(rows) is None
    assert "no collapse" in verdict(rows)


def test_verdict_names_value_and_layer_where_patches_stay_apart():
    assert verdict(table(0.1, 0.2, 0.3124, norm=True)) == "no collapse: P is 0.312 at norm, below 0.5"


def test_verdict_names_where_collapse_sets_in():
    sentence = verdict(table(0.1, 0.6, 0.55, 0.777))
    assert sentence.startswith("collapse sets in at block 1:")
    assert sentence.endswith("0.777 at block 3")


def test_verdict_says_when_patches_are_alike_from_the_start():
    assert verdict(table(0.6, 0.7)).startswith("collapse sets in from the start:")
