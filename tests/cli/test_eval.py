import shutil
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

from pdvit.cli import run as pdvit
from pdvit.config.schema import DataConfig
from pdvit.data.opening import open_source
from tests.files import read_json, read_records, rewrite

FILES = ("eval.csv", "confusion.csv", "eval.json")


@pytest.fixture(scope="module")
def answers(digits_run):
    """The logits of timm's own loading of the run, on the test digits, and the right classes."""
    source = open_source(DataConfig())
    model = timm.create_model(f"local-dir:{digits_run}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((source.splits["test"].images / 255 - mean) / std)
    return logits.double(), source.splits["test"].labels.numpy()


def test_the_numbers_are_those_at_the_end_of_training(run_copy, evaluated):
    summary = read_json(run_copy / "summary.json")
    found = evaluated(run_copy)
    for key in ("accuracy", "loss", "split", "weights"):
        assert found[key] == summary[key]
    last = read_records(run_copy, "eval")[-1]
    found = evaluated(run_copy, "--split", "val")
    assert (found["accuracy"], found["loss"], found["split"]) == (last["accuracy"], last["loss"], "val")


@pytest.mark.parametrize(
    ("data", "place", "split"), [("", "", "all"), (".csv", "", "all"), ("", "val/", "val"), ("", "test/", "test")]
)
def test_other_data_are_evaluated_whole_and_parts_keep_the_runs_files(
    run_copy, workplace, evaluated, data, place, split
):
    digits, rows = open_source(DataConfig()).splits["test"], ["path,label"]
    for index, label in enumerate(digits.labels.tolist()):
        file = Path(f"set/{place}{label}/{index}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        digits.open(index).save(file)
        rows.append(f"{file},{label}")
    Path("set.csv").write_text("\n".join(rows))
    right = evaluated(run_copy)["accuracy"]
    own = {file: (run_copy / file).read_bytes() for file in FILES}
    for flags in ([], ["--split", "all"]):
        found = evaluated(run_copy, "--data", f"set{data}", *flags)
        assert (found["images"], found["accuracy"], found["split"]) == (360, right, "all" if flags else split)
    file = evaluated(run_copy, "--data", f"set{data}", "--limit", 20)["file"]
    if data == "":  # sorted by class
        assert pd.read_csv(Path(file).with_name("eval.csv"))["images"].tolist() == [2] * 10
    parts = [["--limit", 7], ["--split", "val"], ["--split", "all"]]
    assert [evaluated(run_copy, *part)["images"] for part in parts] == [7, 237, 1797]
    assert {file: (run_copy / file).read_bytes() for file in FILES} == own


ON_GPU = ["--device", "cuda", "--batch-size", "128"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--precision", "bf16"], marks=pytest.mark.slow),
        pytest.param(["--model-ema-decay", "0.9", "--micro-batch-size", "5"], marks=pytest.mark.slow),
        pytest.param(["--first", "embed", "--seed", "3"], marks=pytest.mark.slow),
        pytest.param(["--data", "FOLDER", "--img-size", "24", "--batch-size", "4"], marks=pytest.mark.slow),
        pytest.param(["--grad-checkpointing", "--drop-path", "0.2", "--cosine", "0"], marks=pytest.mark.slow),
        pytest.param(ON_GPU, marks=pytest.mark.gpu),
        pytest.param([*ON_GPU, "--precision", "bf16", "--model-ema-decay", "0.9"], marks=pytest.mark.gpu),
    ],
    ids=" ".join,
)
def test_the_numbers_are_those_at_the_end_of_any_training(tiny, workplace, image_folder, evaluated, flags):
    """To the bit, since both round alike: TF32 or not is a setting of the run."""
    flags = [str(image_folder) if flag == "FOLDER" else flag for flag in flags]
    assert pdvit(["train", *tiny, "--epochs", "2", "--batch-size", "24", *flags, "--out", "run"]) == 0
    summary = read_json(Path("run/summary.json"))
    found = evaluated("run", *(ON_GPU[:2] if "cuda" in flags else ()))
    assert (found["accuracy"], found["loss"]) == (summary["accuracy"], summary["loss"])


def test_the_numbers_are_those_of_scikit_learn_for_the_model_that_timm_loads(
    digits_run, tmp_path, evaluated, answers, device
):
    (logits, targets), out, every = answers, tmp_path / "deep" / "elsewhere", list(range(10))
    found = evaluated(digits_run, "--device", device, "--out", out)
    assert found["file"] == str(out / "eval.json")
    assert read_json(out / "eval.json")["accuracy"] == found["accuracy"]
    probabilities = logits.softmax(1).numpy()
    predicted = probabilities.argmax(1)
    assert found["accuracy"] == (predicted == targets).mean()
    assert found["accuracy_top5"] == pytest.approx(top_k_accuracy_score(targets, probabilities, k=5, labels=every))
    assert found["loss"] == pytest.approx(log_loss(targets, probabilities, labels=every), rel=1e-5)
    matrix = pd.read_csv(out / "confusion.csv").pivot(index="class", columns="predicted", values="images")
    assert (matrix.fillna(0).to_numpy() == confusion_matrix(targets, predicted, labels=every)).all()


def test_a_lone_file_is_evaluated_on_the_data_that_are_named(run_copy, workplace, evaluated):
    shutil.copy(run_copy / "model.safetensors", "alone.safetensors")
    own = read_json(run_copy / "summary.json")
    found = evaluated("alone.safetensors", "--data", "digits")
    assert found["file"] == "runs/eval-alone/eval.json"
    assert sorted(path.name for path in Path("runs/eval-alone").iterdir()) == sorted(FILES)
    assert found["accuracy"] == own["accuracy"]
    assert found["loss"] == pytest.approx(own["loss"], rel=1e-6)  # in batches of another size


@pytest.mark.slow
def test_classes_in_another_order_are_matched_by_name(run_copy, evaluated):
    before = evaluated(run_copy)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    config, tensors = read_json(run_copy / "config.json"), load_file(run_copy / "model.safetensors")
    config["label_names"] = [str(digit) for digit in order]
    for name in ("head.weight", "head.bias"):
        tensors[name] = tensors[name][order].clone()
    rewrite(run_copy, tensors, config)
    after = evaluated(run_copy)
    assert (before["matched"], after["matched"]) == ("by name", "by name, in another order")
    assert after["accuracy"] == before["accuracy"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)


class TestRefused:
    def test_weights_and_logits_that_are_no_numbers(self, refusal, run_copy):
        sound = load_file(run_copy / "model.safetensors")
        rewrite(run_copy, sound | {"blocks.1.norm1.weight": torch.full([16], float("inf"))})
        assert "blocks.1.norm1.weight" in refusal("eval", run_copy).what
        rewrite(run_copy, sound | {"head.weight": torch.full_like(sound["head.weight"], 3e38)})
        assert "360 images" in refusal("eval", run_copy, "--device", "cpu").what
        assert not (run_copy / "eval.json").exists()

    def test_data_that_do_not_fit_and_places_that_can_not_be_written(self, refusal, run_copy, image_folder, workplace):
        shutil.copy(run_copy / "model.safetensors", "alone.safetensors")
        assert "--data" in refusal("eval", "alone.safetensors").tip
        assert "'test'" in refusal("eval", run_copy, "--split", "tset").tip
        found = refusal("eval", run_copy, "--data", image_folder)
        assert "10 classes" in found.what
        assert "3" in found.what
        assert not (run_copy / "eval.json").exists()
        Path("file").touch()
        for place in ("file", "file/folder"):
            assert "not a folder" in refusal("eval", run_copy, "--out", place).what
