import json

import numpy as np
import pandas as pd
import pytest

from pdvit.analysis.measure import Analysis
from pdvit.analysis.metrics import DEFINITIONS
from pdvit.analysis.report import statement, with_random, write_analysis, write_between
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
    found = facts(analysis("similarity"))
    assert found["verdict"].startswith("the patches are alike")
    assert "runs/m" in found["advice"]
    assert found["notes"] == []
    found = facts(analysis("effective_rank"))
    assert found["verdict"] is found["advice"] is None
    assert "--metrics similarity" in found["notes"][0]


def test_random_weights_stand_beside_as_a_metric_of_their_own():
    ours, random = analysis("similarity", "norm_mean"), analysis("similarity", "norm_mean")
    found = with_random(ours, random).table
    assert found["metric"].value_counts().to_dict() == {"similarity": 3, "norm_mean": 3, "similarity_random": 3}
    assert found["layer"].tolist() == ["embed", "block 1", "norm"] * 3


def test_random_weights_stand_beside_the_layers_that_were_measured():
    """A segmentation's backbone may lack the final norm, which its model with random weights has."""
    ours = analysis("similarity", layers=("embed", "block 1"))
    found = with_random(ours, analysis("similarity")).table.query("metric == 'similarity_random'")
    assert found["layer"].tolist() == ["embed", "block 1"]


def test_cka_with_other_models_is_written_by_name_and_goes_with_the_next_analysis(tmp_path):
    found = analysis("similarity")
    write_analysis(tmp_path, found, facts(found))
    write_between(tmp_path, {"one": pd.DataFrame([[1.0, 0.5]], ["embed"], ["embed", "norm"])})
    with np.load(tmp_path / "analysis" / "cka_between.npz") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {
            "matrix/one": [[1.0, 0.5]],
            "layers/one": ["embed", "norm"],
            "layers": ["embed"],
        }
    write_analysis(tmp_path, found, facts(found))
    assert [file.name for file in (tmp_path / "analysis").iterdir()] == ["analysis.json"]


def test_curves_are_written_by_group_and_stale_ones_go(tmp_path):
    curves = {"spectrum": {"by_frequency/block 1": np.arange(3.0)}, "cka": {"matrix": np.eye(2)}}
    found = analysis("similarity", curves=curves)
    assert write_analysis(tmp_path, found, facts(found)) == tmp_path / "analysis.csv"
    with np.load(tmp_path / "analysis" / "spectrum.npz") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {"by_frequency/block 1": [0, 1, 2]}
    (tmp_path / "analysis" / "maps.npz").touch()  # of other images, perhaps
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
    with pytest.raises(UserError, match="can't be written"):
        write_between(tmp_path / "file", {"one": pd.DataFrame([[1.0]], ["embed"], ["embed"])})
