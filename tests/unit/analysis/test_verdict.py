import pandas as pd
import pytest

from pdvit.analysis.measure import Analysis
from pdvit.analysis.metrics import DEFINITIONS
from pdvit.analysis.verdict import advice, against_random, climb, describe, last_stage, onset, verdict


def table(*values: float, metric: str = "similarity", norm: bool = False, **more) -> pd.DataFrame:
    names = ["embed", *(f"block {i}" for i in range(1, len(values)))]
    if norm:
        names[-1] = "norm"
    columns = {"layer": names, "depth": range(len(values)), "metric": metric, "mean": values}
    return pd.DataFrame(columns | {"tokens": 16, "ci95": 0.01} | more)


def compared(ours: list[float], random: list[float], **more) -> pd.DataFrame:
    return pd.concat([table(*ours, **more), table(*random, metric="similarity_random", **more)], ignore_index=True)


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
    assert onset(table(*values)) == layer


@pytest.mark.parametrize(
    ("values", "layer"),
    [
        ((0.3, 0.31, 0.3, 0.33, 0.4, 0.6, 0.8), "block 4"),  # 0.03 is no climb yet
        ((0.54, 0.61, 0.30, 0.26, 0.24, 0.21, 0.22, 0.24, 0.23), None),  # a curve that falls
        ((0.9, 0.2, 0.5, 0.3), "block 2"),  # it may fall again, if it stays above
        ((0.5, 0.5, 0.5), None),
        ((0.1, 0.9, 0.1), None),  # a hump
        ((0.4,), None),
    ],
)
def test_the_climb_begins_behind_the_last_layer_that_is_as_low_as_any(values, layer):
    assert climb(table(*values).sample(frac=1, random_state=1)) == layer


def test_other_metrics_do_not_count():
    rows = pd.concat([table(0.1, 0.2, 0.3), table(0.9, 0.9, 0.9, metric="similarity_signed")])
    assert onset(rows) is None
    assert verdict(rows).startswith("no collapse:")


def test_in_stages_only_the_last_one_is_compared():
    rows = table(0.01, 0.02, 0.6, 0.4, 0.62, norm=True, tokens=[64, 64, 16, 16, 16])
    assert last_stage(rows)["layer"].tolist() == ["block 2", "block 3", "norm"]
    assert climb(rows) == "norm"
    sentence = "the patches collapse: P in the last stage climbs from norm on, is at or above 0.5 from norm on, and is"
    assert verdict(rows) == f"{sentence} 0.620 at norm"


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
def test_a_difference_from_random_weights_has_to_be_large_and_sure(ours, random, width, answer):
    assert against_random(compared([0.1, ours], [0.9, random], ci95=width)) == answer
    assert against_random(table(0.1, ours)) is None


@pytest.mark.parametrize(
    ("ours", "random", "begins"),
    [
        (0.8, 0.3, "the patches collapse: P climbs from block 1 on, is at or above 0.5 from block 1 on, and is 0.800"),
        (0.8, 0.9, "the patches are alike, but less than with random weights: P climbs"),  # as untrained ones do
        (0.8, 0.8, "the patches are alike, but no more than with random weights: P climbs"),
        (0.3, 0.1, "no collapse, but patches more alike than with random weights: P climbs from block 1 on, and is"),
        (0.3, 0.6, "no collapse: P climbs"),
        (0.12, 0.12, "no collapse: P does not climb with depth, and is 0.120 at block 1"),
    ],
)
def test_the_verdict_compares_with_random_weights(ours, random, begins):
    sentence = verdict(compared([0.1, ours], [0.1, random]))
    assert sentence.startswith(begins)
    assert sentence.endswith(f"(random weights on the same images: {random:.3f})")


def test_a_climb_counts_beyond_that_of_random_weights():
    assert verdict(compared([0.3, 0.6], [0.7, 0.7])).startswith("the patches collapse: P climbs from block 1")
    assert verdict(compared([0.55, 0.65], [0.6, 0.66])).startswith("the patches are alike, but no more than")
    assert "which trains P down" in advice(compared([0.3, 0.6], [0.7, 0.7]), "run")
    assert "other --images" in advice(compared([0.55, 0.65], [0.6, 0.66]), "run")


@pytest.mark.parametrize(
    ("random", "text"),
    [
        (0.78, "the patches are alike, but no more than with random weights: P does not climb"),
        (0.95, "the patches are alike, but less than with random weights: P does not climb"),
        (0.3, "the patches collapse: P does not climb with depth, is at or above 0.5 from the start"),
    ],
)
def test_patches_that_are_alike_from_the_start_collapse_only_beside_random_weights(random, text):
    assert verdict(compared([0.8, 0.8], [random, random])).startswith(text)


def test_without_random_weights_the_verdict_goes_by_p_alone():
    assert verdict(table(0.1, 0.2, 0.3124, norm=True)).endswith("block 1 on, and is 0.312 at norm")
    assert verdict(table(0.1, 0.6, 0.55, 0.777)).startswith("the patches collapse: P climbs from block 1 on")
    assert "is at or above 0.5 from the start" in verdict(table(0.6, 0.7))


def test_patches_that_are_alike_from_the_start_are_not_called_collapsed_uncompared():
    rows = table(0.6, 0.62)  # of an analysis that was stopped
    assert verdict(rows).startswith("the patches are alike (not compared with random weights): P does not climb")
    assert "pdvit analyze 'my run' to the end" in advice(rows, "my run")


def test_patches_that_are_zero_get_no_verdict():
    rows = compared([0.0, 0.0], [0.1, 0.8])
    assert verdict(rows) == "no verdict: P is exactly 0 at block 1, as of patches that are zero"
    assert "--metrics norms" in advice(rows, "my run")


def outliers(value: float, without: float) -> pd.DataFrame:
    """The last block has outliers; the final norm, which makes all tokens alike in length, hides them."""
    rows = compared([0.1, value, value], [0.1, 0.1, 0.1], norm=True)
    rest = table(0.1, without, value, metric="similarity_without_outliers", norm=True)
    return pd.concat([rows, rest])


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (compared([0.1, 0.8], [0.1, 0.3]), "pdvit finetune 'my run' --data SOURCE --cosine 1, which trains P down"),
        (table(0.1, 0.8), "pdvit finetune 'my run'"),
        (compared([0.8, 0.8], [0.8, 0.8]), "other --images"),
        (compared([0.1, 0.8], [0.1, 0.8]), "other --images"),
        (compared([0.1, 0.4], [0.1, 0.1]), "segmentation"),
        (compared([0.1, 0.4], [0.1, 0.4]), "nothing against collapse"),
        (outliers(0.8, 0.5), "register tokens, since patches of outlying length make up 0.30 of P"),
        (outliers(0.8, 0.79), "trains P down"),
    ],
)
def test_the_advice_goes_with_the_verdict(rows, text):
    found = advice(rows, "my run")
    assert found.startswith("to try")
    assert text in found


def facts(
    *metrics: str, layers: tuple[str, ...] = ("embed", "block 1", "norm"), architecture: str = "", notes=()
) -> dict:
    rows = [("m", layer, i, metric, 0.5, 0.1, 0.1, 7, 16) for metric in metrics for i, layer in enumerate(layers)]
    columns = ["model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens"]
    analysis = Analysis(pd.DataFrame(rows, columns=columns), 7, list(layers), notes=list(notes))
    names = {"checkpoint": "runs/m", "weights": "raw", "images": "pictures", "prefix": 1, "device": "cpu"}
    return describe(analysis, architecture=architecture, **names)


def test_the_facts_define_what_was_measured():
    found = facts("similarity", "cka_last", notes=["two images were left out"])
    assert found["metrics"] == {name: DEFINITIONS[name].text for name in ("similarity", "cka_last")}
    assert found["notes"] == ["two images were left out"]
    assert (found["images_measured"], found["patch_tokens"], found["prefix_tokens_dropped"]) == (7, 16, 1)
    assert "the final norm" in found["layers"]
    assert "no final norm" in facts("similarity", layers=("embed", "block 1"))["layers"]
    assert found["verdict"].startswith("the patches are alike")
    assert "runs/m" in found["advice"]


def test_there_is_no_verdict_without_p():
    found = facts("effective_rank")
    assert found["verdict"] is found["advice"] is None
    assert "--metrics similarity" in found["notes"][0]


def test_published_values_are_of_one_model_by_name_and_depth():
    blocks = [f"block {i}" for i in range(1, 13)]
    found = facts("similarity", layers=("embed", *blocks), architecture="vit_base_patch32_224.augreg_in21k_ft_in1k")
    assert "issue 3" in found["published"]
    assert facts("similarity", architecture="vit_base_patch32_224")["published"] is None
