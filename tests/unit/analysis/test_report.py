import json

import numpy as np
import pandas as pd
import pytest

from pdvit.analysis.measure import Analysis
from pdvit.analysis.metrics import DEFINITIONS
from pdvit.analysis.report import statement, write_analysis
from pdvit.errors import UserError


def analysis(*metrics: str, layers: tuple[str, ...] = ("embed", "block 1", "norm"), **more) -> Analysis:
    rows = [("m", layer, i, metric, 0.5, 0.1, 0.1, 7, 16) for metric in metrics for i, layer in enumerate(layers)]
    columns = ["model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens"]
    return Analysis(pd.DataFrame(rows, columns=columns), 7, list(layers), **more)


def facts(found: Analysis) -> dict:
    return statement(found, "pictures", 1, "last", "runs/m", "cpu")


def test_it_defines_what_was_measured_and_says_what_is_missing():
    found = facts(analysis("similarity", "cka_last", notes=["two images were left out"]))
    assert found["metrics"] == {name: DEFINITIONS[name].text for name in ("similarity", "cka_last")}
    assert found["notes"] == ["two images were left out"]
    assert (found["images_measured"], found["patch_tokens"], found["prefix_tokens_dropped"]) == (7, 16, 1)
    assert "the final norm" in found["layers"]
    assert "no final norm" in facts(analysis("similarity", layers=("embed", "block 1")))["layers"]


def test_there_is_no_verdict_without_p():
    assert facts(analysis("similarity"))["verdict"].startswith("collapse sets in")
    assert facts(analysis("effective_rank"))["verdict"] is None


def test_curves_are_written_by_group_and_stale_ones_go(tmp_path):
    curves = {"spectrum": {"by_frequency/block 1": np.arange(3.0)}, "cka": {"matrix": np.eye(2)}}
    found = analysis("similarity", curves=curves)
    assert write_analysis(tmp_path, found, facts(found)) == tmp_path / "analysis.csv"
    with np.load(tmp_path / "analysis" / "spectrum.npz") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {"by_frequency/block 1": [0, 1, 2]}
    again = analysis("similarity", curves={"cka": {"matrix": np.eye(3)}})
    write_analysis(tmp_path, again, facts(again))
    assert sorted(file.name for file in (tmp_path / "analysis").iterdir()) == ["analysis.json", "cka.npz"]
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text())["images_measured"] == 7
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "analysis.csv"), again.table)


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    found = analysis("similarity")
    with pytest.raises(UserError, match="can't be written"):
        write_analysis(tmp_path / "file", found, facts(found))
