import numpy as np
import pytest

from pdvit.errors import UserError
from pdvit.plots.reading import checkpoint_of, read_run


def test_an_analysis_is_read_with_its_curves_by_layer(tmp_path, analysis_folder):
    run = read_run(analysis_folder(tmp_path / "run"), "one", "pairs")
    assert set(run.table["metric"]) >= {"similarity", "norm_mean", "new_metric"}
    assert run.table["depth"].tolist()[:5] == [0, 1, 2, 3, 4]
    assert list(run.curve("pairs", "histogram")) == ["embed", "block 1", "block 2", "block 3", "norm"]


def test_a_model_called_na_keeps_its_name_and_the_checkpoint_is_the_run(tmp_path, analysis_table):
    analysis_table([0.1, 0.2, 0.3]).assign(model="NA").to_csv(tmp_path / "analysis.csv", index=False)
    assert read_run(tmp_path, "one").table["model"].unique().tolist() == ["NA"]
    assert checkpoint_of(tmp_path) == str(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", b"\x80\x04."])
def test_a_damaged_file_of_curves_is_named(tmp_path, analysis_folder, content):
    run = analysis_folder(tmp_path / "run")
    (run / "analysis" / "pairs.npz").write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught:
        read_run(run, "one", "pairs")
    assert f"pdvit analyze {run}.safetensors --metrics pairs" in caught.value.tip


def test_a_file_with_objects_is_not_executed(tmp_path, analysis_folder):
    run = analysis_folder(tmp_path / "run")
    np.savez(run / "analysis" / "pairs.npz", histogram=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        read_run(run, "one", "pairs")
