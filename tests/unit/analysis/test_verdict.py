import pandas as pd
import pytest

from pdvit.analysis.verdict import against_random, climb, last_stage, onset, verdict


def table(*values: float, metric: str = "similarity", norm: bool = False, **more) -> pd.DataFrame:
    names = ["embed", *(f"block {i}" for i in range(1, len(values)))]
    if norm:
        names[-1] = "norm"
    columns = {"model": "m", "layer": names, "depth": range(len(values)), "metric": metric, "mean": values}
    return pd.DataFrame(columns | {"std": 0.1, "ci95": 0.01, "images": 7, "tokens": 16} | more)


def compared(ours: list[float], random: list[float], **more) -> pd.DataFrame:
    return pd.concat([table(*ours, **more), table(*random, metric="similarity_random", **more)], ignore_index=True)


def outliers(value: float, without: float) -> pd.DataFrame:
    """The last block has outliers; the final norm, which makes all tokens similar in length, hides them."""
    rows = compared([0.1, value, value], [0.1, 0.1, 0.1], norm=True)
    return pd.concat([rows, table(0.1, without, value, metric="similarity_without_outliers", norm=True)])


@pytest.mark.parametrize(
    ("begins", "values", "layer"),
    [
        (onset, (0.1, 0.2, 0.3), None),
        (onset, (0.1, 0.6, 0.9), "block 1"),
        (onset, (0.6, 0.7, 0.8), "embed"),
        (onset, (0.9, 0.9, 0.4), None),  # it recovers at the end
        (onset, (0.9, 0.4, 0.9), "block 2"),  # values before a dip do not count
        (onset, (0.1, 0.4999, 0.5), "block 2"),  # the limit itself counts
        (climb, (0.3, 0.31, 0.3, 0.33, 0.4, 0.6, 0.8), "block 4"),  # 0.03 is no climb yet
        (climb, (0.54, 0.61, 0.30, 0.26, 0.24, 0.21, 0.22, 0.24, 0.23), None),  # a curve that falls
        (climb, (0.9, 0.2, 0.5, 0.3), "block 2"),  # it may fall again, if it stays above
        (climb, (0.1, 0.9, 0.1), None),  # a hump
        (climb, (0.4,), None),
    ],
)
def test_onset_and_climb_begin_at_the_first_layer_from_which_p_stays_high_or_above_its_minimum(begins, values, layer):
    other = table(*[0.9] * len(values), metric="similarity_signed")
    rows = pd.concat([table(*values), other]).sample(frac=1, random_state=1)
    assert begins(last_stage(rows)) == layer


def test_in_stages_only_the_last_one_counts():
    rows = table(0.01, 0.02, 0.6, 0.4, 0.62, norm=True, tokens=[64, 64, 16, 16, 16])
    assert last_stage(rows)["layer"].tolist() == ["block 2", "block 3", "norm"]
    sentence = "the patches collapse: P in the last stage climbs from norm on, is at or above 0.5 from norm on, and is"
    assert verdict(rows, "measure", "train")[0] == f"{sentence} 0.620 at norm"


@pytest.mark.parametrize(
    ("ours", "random", "width", "answer"),
    [
        (0.8, 0.3, 0.01, 1),
        (0.8, 0.9, 0.01, -1),
        (0.8, 0.76, 0.001, 0),  # too small a difference to count
        (0.8, 0.6, 0.15, 0),  # the intervals overlap
        (0.8, 0.6, float("nan"), 1),  # of a single image
    ],
)
def test_a_difference_from_random_weights_has_to_be_large_and_certain(ours, random, width, answer):
    assert against_random(compared([0.1, ours], [0.9, random], ci95=width)) == answer
    assert against_random(table(0.1, ours)) is None


COLLAPSE, TRAIN = "the patches collapse: P ", "analyze again: train"
SIMILAR = "the patches are alike, but no more than with random weights: P "


@pytest.mark.parametrize(
    ("rows", "begins", "advised"),
    [
        (compared([0.1, 0.8], [0.1, 0.3]), f"{COLLAPSE}climbs from block 1 on, is at or above 0.5 from bl", TRAIN),
        (compared([0.3, 0.6], [0.7, 0.7]), f"{COLLAPSE}climbs from block 1", TRAIN),
        (compared([0.8, 0.8], [0.3, 0.3]), f"{COLLAPSE}does not climb with depth, is at or above 0.5 from the s", ""),
        (compared([0.1, 0.8], [0.1, 0.9]), "the patches are alike, but less than with random weights: P climbs", ""),
        (compared([0.1, 0.8], [0.1, 0.8]), f"{SIMILAR}climbs", "other --images"),
        (compared([0.55, 0.65], [0.6, 0.66]), f"{SIMILAR}climbs", "other --images"),  # the climb of random weights
        (compared([0.8, 0.8], [0.78, 0.78]), f"{SIMILAR}does not climb", "other --images"),
        (compared([0.1, 0.3], [0.1, 0.1]), "no collapse, but patches more alike than with random", "segmentation"),
        (compared([0.1, 0.3], [0.1, 0.6]), "no collapse: P climbs", "nothing against collapse"),
        (outliers(0.8, 0.5), COLLAPSE, "register tokens, since patches of outlying length make up 0.30 of P"),
        (outliers(0.8, 0.79), COLLAPSE, TRAIN),
        (table(0.1, 0.6, 0.55, 0.777), f"{COLLAPSE}climbs from block 1 on", TRAIN),
        # of an analysis that was stopped
        (table(0.6, 0.62), "the patches are alike (not compared with random", "may be as alike: measure"),
        (compared([0.0, 0.0], [0.1, 0.8]), "no verdict: P is exactly 0 at block 1", "--metrics norms"),
    ],
)
def test_verdict_and_advice(rows, begins, advised):
    found, advice = verdict(rows, "measure", "train")
    assert found.startswith(begins)
    assert advice.startswith("to try")
    assert advised in advice
