import math
import re

import pandas as pd
import pytest

from pdvit.analysis.verdict import last_stage, verdict


def table(*values: float, metric: str = "similarity", norm: bool = False, **more) -> pd.DataFrame:
    names = ["embed", *(f"block {i}" for i in range(1, len(values)))]
    if norm:
        names[-1] = "norm"
    columns = {"model": "m", "layer": names, "depth": range(len(values)), "metric": metric, "mean": values}
    return pd.DataFrame(columns | {"std": 0.1, "ci95": 0.01, "images": 70, "tokens": 16} | more)


def compared(ours: list[float], random: list[float], **more) -> pd.DataFrame:
    return pd.concat([table(*ours, **more), table(*random, metric="similarity_random", **more)], ignore_index=True)


def outliers(value: float, without: float) -> pd.DataFrame:
    """The last block has outliers; the final norm, which makes all tokens similar in length, hides them."""
    rows = compared([0.1, value, value], [0.1, 0.1, 0.1], norm=True)
    return pd.concat([rows, table(0.1, without, value, metric="similarity_without_outliers", norm=True)])


def test_in_stages_only_the_last_one_counts():
    rows = table(0.01, 0.02, 0.6, 0.4, 0.62, norm=True, tokens=[64, 64, 16, 16, 16])
    assert last_stage(rows)["layer"].tolist() == ["block 2", "block 3", "norm"]
    level = "the patches are alike at the end: P is 0.620 at norm (not compared with random weights)"
    climbs = "P climbs from norm on: it ends 0.220 above its minimum"
    assert verdict(rows, "measure", "train")[0] == f"in the last stage, {level}\nin the last stage, {climbs}"


ALL, SOME, NONE = "patches are alike at every layer", "patches are alike at the end", "patches are not alike at the end"
RISES, STAYS, TRAIN = "P climbs from block 1 on: it ends 0.", "P does not climb: it ends 0.", "analyze again:\ntrain"
VARIED = "use more varied --images"


@pytest.mark.parametrize(
    ("rows", "level", "course", "advised"),
    [
        (compared([0.1, 0.8], [0.1, 0.3]), f"{SOME}: P is 0.800 (0.300, lower)", f"{RISES}700 (0.200, less)", TRAIN),
        (compared([0.3, 0.6], [0.7, 0.7]), f"{SOME}: P is 0.600 (0.700, higher)", f"{RISES}300 (0.000, less)", TRAIN),
        (compared([0.8, 0.8], [0.3, 0.3]), f"{ALL}: P is 0.800 (0.300, lower)", STAYS, TRAIN),
        (compared([0.1, 0.8], [0.1, 0.9]), f"{SOME}: P is 0.800 (0.900, higher)", f"{RISES}700 (0.800, more)", VARIED),
        (compared([0.1, 0.8], [0.1, 0.76], ci95=0.0), "(0.760, about as high)", RISES, VARIED),  # too small to count
        (compared([0.1, 0.8], [0.1, 0.6], ci95=0.15), "(0.600, the intervals overlap)", RISES, TRAIN),
        (compared([0.1, 0.8], [0.1, 0.6], ci95=math.nan), "(0.600, lower)", RISES, TRAIN),  # of a single image
        (compared([0.1, 0.8], [0.1, 0.8]), "(0.800, about as high)", f"{RISES}700 (0.700, about as much)", VARIED),
        (compared([0.55, 0.65], [0.6, 0.66]), ALL, f"{RISES}100 (0.060, about as much)", VARIED),
        (compared([0.8, 0.8], [0.78, 0.78]), ALL, STAYS, VARIED),
        (compared([0.1, 0.3], [0.1, 0.1]), f"{NONE}: P is 0.300 (0.100, lower)", RISES, "segmentation"),
        (compared([0.1, 0.3], [0.1, 0.6]), f"{NONE}: P is 0.300 (0.600, higher)", RISES, "P gives no reason to change"),
        (outliers(0.8, 0.5), "alike from block 1 to the end: P is 0.800", RISES, "outlying length make up 0.30 of P"),
        (outliers(0.8, 0.79), "alike from block 1 to the end: P is 0.800", RISES, TRAIN),
        (table(0.1, 0.6, 0.55, 0.777), "alike from block 1 to the end: P is 0.777 (not", RISES, TRAIN),
        (table(0.1, 0.4999, 0.5), SOME, RISES, TRAIN),  # the limit itself counts
        (table(0.9, 0.4, 0.9), SOME, "P climbs from block 2 on", TRAIN),  # values before a dip do not count
        (table(0.3, 0.31, 0.3, 0.33, 0.4, 0.6), SOME, "P climbs from block 4 on", TRAIN),  # 0.03 is no climb yet
        (table(0.9, 0.2, 0.5, 0.3), NONE, "P climbs from block 2 on", "norms,rank"),  # it stays above its minimum
        (pd.concat([table(0.1, 0.2), table(5, 6, metric="effective_rank")]), NONE, RISES, "read the other metrics"),
        (table(0.1, 0.9, 0.1), NONE, STAYS, "norms,rank"),  # it recovers at the end
        (table(0.6, 0.62), f"{ALL}: P is 0.620 (not compared with", STAYS, "may be as alike:\nmeasure"),
        (compared([0.0, 0.0], [0.1, 0.8]), "no verdict: P is exactly 0", None, "--metrics similarity,norms"),
    ],
)
def test_the_verdict_is_two_statements_each_beside_random_weights(rows, level, course, advised):
    found, advice = verdict(rows.sample(frac=1, random_state=1), "measure", "train")
    statements = re.sub(r" at (block \d|norm)(?= \(|,)| above its minimum|random weights: ", "", found).split("\n")
    for statement, expected in zip(statements, filter(None, (level, course)), strict=True):
        assert expected in statement
    assert advice.startswith("to try")
    assert advised in advice


@pytest.mark.parametrize(
    ("images", "ci95", "line"),
    [
        *((16, 0.3, None), (1, math.nan, "only 1 image was measured, so others may differ: it has no interval")),
        (2, 0.3, "only 2 images were measured, so others may differ: the 95 % interval of P is ± 0.300"),
    ],
)
def test_the_verdict_of_few_images_has_their_number_and_the_interval(images, ci95, line):
    rows = compared([0.1, 0.8], [0.1, 0.6], images=images, ci95=ci95)
    assert verdict(rows, "measure", "train")[0].split("\n")[2:] == ([] if line is None else [line])
