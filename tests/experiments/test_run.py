"""experiments/run.py from start to end, against the files of the runs and models built by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from run import main

from pdvit.cli import run as pdvit
from pdvit.config import Config
from pdvit.config.schema import DataConfig
from pdvit.data.loader import LoaderConfig, eval_batches
from pdvit.data.opening import held_out_images
from pdvit.data.preprocessing import Preprocessing
from pdvit.similarity import patch_similarity
from tests.files import read_csv, read_json, read_records
from tests.processes import finish

SCRIPT = Path(__file__).parents[2] / "experiments" / "run.py"
BASE = """
data = {{ source = "digits", batch_size = 16, {size} }}
model = {{ {model} }}
optim = {{ opt = "sgd", lr = 1e-2, epochs = "{steps}st", warmup = "1st" }}
run = {{ device = "cpu", log_every = "1st", name = "{name}" }}
[sweep]
"run.seed" = [3]
{sweep}
"""
SIZE, MODEL = "img_size = 16", "depth = 2, width = 16, heads = 1, patch_size = 8"
TWO = '[[sweep.variant]]\nname = "none"\n"diversity.preset" = "none"\n[[sweep.variant]]\nname = "paper"\n'
BROKEN = '[[sweep.variant]]\nname = "diverging"\n"optim.lr" = 1e30\n'
close = {"rel": 6e-5, "abs": 1e-9}  # five digits


def write(name: str, sweep: str, steps: int = 30, size: str = SIZE, model: str = MODEL) -> None:
    Path("claim").mkdir(exist_ok=True)
    text = BASE.format(size=size, model=model, steps=steps, name=f"claim-{name}", sweep=sweep)
    Path("claim", f"{name}.toml").write_text(text)


def start(*words: str) -> subprocess.Popen[str]:
    line = [sys.executable, str(SCRIPT), str(Path("claim").resolve()), *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=environment, start_new_session=True, **pipe)


def rows(name: str) -> list[dict[str, str]]:
    return read_csv(Path("claim", name))


def similarity_at_start(seed: int) -> dict[str, float]:
    """Return P on the test images of a model that timm builds with this seed."""
    torch.manual_seed(seed)
    arguments = {"img_size": 16, "depth": 2, "embed_dim": 16, "num_heads": 1, "patch_size": 8, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    loader_config = LoaderConfig(32, 0, 0, torch.device("cpu"), Preprocessing.for_model(model))
    found: dict[str, list[float]] = {"block 2": [], "norm": []}
    for name, module in (("block 2", model.blocks[1]), ("norm", model.norm)):
        module.register_forward_hook(lambda _, __, x, name=name: found[name].extend(patch_similarity(x[:, 1:])))
    split = held_out_images(Config(data=DataConfig(source="digits"))).subsample(256).split
    with torch.no_grad():
        for batch in eval_batches(split, loader_config):
            model(batch.images)
    return {name: float(sum(values)) / len(values) for name, values in found.items()}


def analysis(run: Path) -> dict[tuple[str, str], float]:
    """Return the table of `pdvit analyze`."""
    assert pdvit(["analyze", str(run), "--metrics", "similarity,rank", "--device", "cpu"]) == 0
    return {(row["layer"], row["metric"]): float(row["mean"]) for row in read_csv(run / "analysis.csv")}


def check_row(row: dict[str, str], run: Path) -> None:
    """Compare a row with the files of its run."""
    summary = read_json(run / "summary.json")
    for name in ("accuracy", "loss", "similarity_first", "similarity_last", "seconds", "steps"):
        assert float(row[name]) == pytest.approx(summary[name], **close)
    last = read_records(run, "eval")[-1]
    assert float(row["accuracy_val"]) == pytest.approx(last["accuracy"], **close)
    environment = read_json(run / "environment.json")
    assert row["torch"] == environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert (row["threads"], row["cores"]) == ("1", str(environment["cores"]))
    measured = analysis(run)
    for name, layer in (("block", "block 2"), ("norm", "norm")):
        assert float(row[f"similarity_{name}"]) == pytest.approx(measured[layer, "similarity"], **close)
        assert float(row[f"rank_{name}"]) == pytest.approx(measured[layer, "effective_rank"], **close)


@pytest.mark.parametrize("line", ["nonsense", "segmentation", "digits --cells 99"])
def test_a_folder_table_or_cell_that_does_not_exist_is_refused(line, workplace, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run.py", *line.split()])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main() == 2
    assert line.split()[-1] in "".join(capfd.readouterr())
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_folder_is_run_measured_and_written(workplace):
    write("cpu", TWO + BROKEN)
    finish(start(), 1)
    found, sweep = rows("results.csv"), workplace / "runs" / "claim-cpu"
    assert [row["variant"] for row in found] == ["none", "paper", "diverging"]
    assert [row["status"] for row in found] == ["finished", "finished", "failed"]
    before = similarity_at_start(seed=3)
    for row in found[:2]:
        check_row(row, sweep / row["name"])
        for name, layer in (("block", "block 2"), ("norm", "norm")):
            assert float(row[f"similarity_{name}_before"]) == pytest.approx(before[layer], **close)
    assert "not a number" in found[2]["reason"]
    assert int(found[2]["loss_spikes"]) > 0
    assert found[2]["similarity_block"] == found[2]["accuracy"] == ""

    layers = rows("layers.csv")
    assert len(layers) == 2 * 2 * 4  # cells, after and before, layers
    paper = {(row["when"], row["layer"]): row for row in layers if row["variant"] == "paper"}
    assert paper["after", "norm"]["similarity"] == found[1]["similarity_norm"]
    assert paper["before", "block 2"]["effective_rank"] == found[1]["rank_block_before"]
    assert {(row["run.seed"], row["depth"]) for row in layers if row["layer"] == "norm"} == {("3", "3")}
    texts = [Path("claim", name).read_text() for name in ("results.csv", "layers.csv")]
    assert not [text for text in texts if str(workplace) in text or "/tmp" in text]

    times = {file: file.stat().st_mtime_ns for file in sweep.glob("*/layers.csv")}
    assert "layers" not in finish(start(), 1).replace("layers.csv", "")
    assert {file: file.stat().st_mtime_ns for file in sweep.glob("*/layers.csv")} == times
    assert [Path("claim", name).read_text() for name in ("results.csv", "layers.csv")] == texts
    assert pdvit(["plot", "sweep", "claim/results.csv", "--metric", "rank_block"]) == 0

    # Runs that go on from these begin with their weights.
    write("gpu", TWO, steps=2, size="workers = 2", model='init = "runs/claim-cpu/{variant}-seed={run.seed}"')
    finish(start("gpu", "--parallel", "1"), 0)
    for row, first in zip(rows("results-gpu.csv"), found, strict=False):
        for name in ("similarity_block", "rank_block", "similarity_norm", "rank_norm"):
            assert row[f"{name}_before"] == first[name]
    assert len(rows("layers-gpu.csv")) == len(layers)


@pytest.mark.slow
def test_a_tuning_prints_the_best_rates_and_measures_nothing_else(workplace):
    write("tuning", '"optim.lr" = [1e-3, 1e-2]\n' + TWO, steps=3)
    shown = finish(start("tuning", "--set", "optim.weight_decay=0.5"), 0)
    found = rows("../runs/claim-tuning/tuning.csv")  # of another recipe, so not beside this one
    for variant in ("none", "paper"):
        scores = [(-float(row["accuracy_val"]), row["optim.lr"]) for row in found if row["variant"] == variant]
        assert len(scores) == 2
        assert f'"optim.lr" = {min(scores)[1]}  # {variant}: ' in shown
    assert "similarity_block" not in found[0]
    assert sorted(path.name for path in Path("claim").iterdir()) == ["tuning.toml"]
    runs = list((workplace / "runs" / "claim-tuning").glob("*/run.toml"))
    assert len(runs) == 4
    assert all("weight_decay = 0.5" in run.read_text() for run in runs)
