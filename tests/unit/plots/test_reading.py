import numpy as np
import pytest

from pdvit.errors import UserError
from pdvit.plots.reading import checkpoint_of, layers_of, read_analysis, read_curves


def test_the_table_is_read_as_it_is(tmp_path, analysis_folder):
    table = read_analysis(analysis_folder(tmp_path / "run"), ["similarity"])
    assert set(table["metric"]) >= {"similarity", "norm_mean", "new_metric"}
    assert table["depth"].tolist()[:5] == [0, 1, 2, 3, 4]


def test_a_model_called_na_keeps_its_name(tmp_path, analysis_table):
    table = analysis_table([0.1, 0.2, 0.3]).assign(model="NA")
    table.to_csv(tmp_path / "analysis.csv", index=False)
    assert read_analysis(tmp_path)["model"].unique().tolist() == ["NA"]


def test_a_metric_that_was_not_measured_is_an_error_with_the_command(tmp_path, analysis_folder):
    run = analysis_folder(tmp_path / "run")
    with pytest.raises(UserError, match="effective_rank") as caught:
        read_analysis(run, ["effective_rank"], "rank")
    assert f"pdvit analyze {run}.safetensors --metrics rank" in caught.value.tip


def test_curves_that_were_not_measured_are_an_error_with_the_command(tmp_path, analysis_table):
    analysis_table([0.1, 0.2, 0.3]).to_csv(tmp_path / "analysis.csv", index=False)
    with pytest.raises(UserError) as caught:
        read_curves(tmp_path, "pairs", ["histogram"])
    assert f"pdvit analyze {tmp_path} --metrics pairs" in caught.value.tip


def test_curves_are_read_with_their_layers(tmp_path, analysis_folder):
    arrays = read_curves(analysis_folder(tmp_path / "run"), "pairs", ["histogram", "edges"])
    assert layers_of(arrays, "histogram") == ["embed", "block 1", "block 2", "block 3", "norm"]


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", b"\x80\x04."])
def test_a_damaged_file_of_curves_is_named(tmp_path, analysis_folder, content):
    run = analysis_folder(tmp_path / "run")
    (run / "analysis" / "pairs.npz").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_curves(run, "pairs", ["histogram"])


def test_a_file_with_objects_is_not_executed(tmp_path, analysis_folder):
    run = analysis_folder(tmp_path / "run")
    np.savez(run / "analysis" / "pairs.npz", histogram=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        read_curves(run, "pairs", ["histogram"])


def test_without_a_statement_the_checkpoint_is_the_run(tmp_path):
    assert checkpoint_of(tmp_path) == str(tmp_path)
