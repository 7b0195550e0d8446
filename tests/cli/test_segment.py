"""`pdvit segment`, and the other commands on its runs."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdvit.cli import run as pdvit
from pdvit.config import build, resolve
from pdvit.data.masks.folders import open_masks
from pdvit.data.unused import unused_settings
from pdvit.engine.distributed import SINGLE_PROCESS
from pdvit.engine.recovery import largest
from pdvit.engine.trainer import Trainer
from pdvit.tasks.segmentation import SegmentationTask
from pdvit.workflows.runs import trial_config
from tests.cli.conftest import CPU
from tests.files import assert_same, read_json, read_records, weights

SCORES = ("miou", "accuracy", "accuracy_mean", "loss")
MODEL = ["--depth", "2", "--width", "16", "--heads", "1", "--patch-size", "8", "--head-width", "8"]


def train(shapes: Path, out: Path, *more: str, command: str = "segment") -> int:
    length = [] if "--epochs" in more else ["--epochs", "4"]
    flags = ["--data", str(shapes), "--crop", "32", "--batch-size", "4", "--out", str(out), *CPU, *MODEL, *length]
    return pdvit([command, *flags, *more])


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    """A finished run; never write into it, use a copy. Without TF32, also where a GPU measures it."""
    out = tmp_path_factory.mktemp("trained") / "shapes"
    assert train(shapes, out, "--diversity", "paper", "--no-tf32") == 0
    return out


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def test_eval_equals_the_end_of_the_run(trained, copy, evaluated):
    summary, found = read_json(trained / "summary.json"), evaluated(copy)
    assert {"similarity_first", "similarity_last", "images_per_second"} <= set(summary)
    assert {name: found[name] for name in (*SCORES, "split")} == {name: summary[name] for name in (*SCORES, "split")}
    assert set(found["iou"]) == {"ground", "disc", "square"}
    assert found["miou"] == pytest.approx(np.mean([value for value in found["iou"].values() if value is not None]))
    assert (copy / "iou.csv").read_bytes() == (trained / "iou.csv").read_bytes()
    names = {path.name for path in (trained / "predictions").iterdir()}
    assert names == {f"{n:02}-{kind}.png" for n in (1, 2, 3) for kind in ("image", "truth", "prediction")}
    assert {"cosine", "contrastive", "aux", "class"} <= set(read_records(trained, "train")[0])
    assert len(read_records(trained, "similarity")) == 4


@pytest.mark.gpu
def test_eval_on_a_gpu_equals_the_end_of_the_run(shapes, copy, evaluated, tmp_path):
    """Bit for bit if the run was on the GPU too; else a pixel in a thousand may change its class."""
    assert train(shapes, tmp_path / "gpu", "--diversity", "paper", "--device", "cuda") == 0
    for run, tolerance in ((copy, 2e-3), (tmp_path / "gpu", 0)):
        summary, found = read_json(run / "summary.json"), evaluated(run, "--device", "cuda")
        for name in SCORES:
            assert found[name] == pytest.approx(summary[name], abs=tolerance, rel=0)


def counted(truths: Path, predictions: Path, classes: int, first: int, ignored: int) -> float:
    """mIoU of palette PNG files, where ids of the truth begin at `first`: a plain loop over files and classes."""
    both, either = np.zeros(classes), np.zeros(classes)
    for file in sorted(truths.iterdir()):
        truth = np.array(Image.open(file)).astype(int)
        predicted = np.array(Image.open(predictions / file.name))
        assert predicted.shape == truth.shape
        known = truth != ignored
        for c in range(classes):
            both[c] += ((predicted == c) & (truth == c + first) & known).sum()
            either[c] += (((predicted == c) | (truth == c + first)) & known).sum()
    there = either > 0
    return float(np.mean(both[there] / either[there]))


def test_miou_is_that_of_the_masks_that_predict_writes(shapes, copy, evaluated, tmp_path, device):
    found, out = evaluated(copy, "--device", device), tmp_path / "out"
    images = str(shapes / "images" / "val")
    assert pdvit(["predict", str(copy), images, *CPU, "--out", str(out), "--device", device]) == 0
    truths = shapes / "masks" / "val"
    assert found["miou"] == pytest.approx(counted(truths, out / "masks", 3, 0, 7), abs=1e-12)
    for file in truths.iterdir():
        truth, mask = np.array(Image.open(file)), Image.open(out / "masks" / file.name)
        assert (mask.mode, mask.getpalette()[:9]) == ("P", [0, 0, 0, 255, 0, 0, 0, 255, 0])
        assert np.array(Image.open(out / "overlays" / file.name)).shape == (*truth.shape, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pack", "images", "masks", "numbers"),
    [
        ("ade20k-sample/ADEChallengeData2016", "images/validation", "annotations/validation", (150, 1, 0)),
        ("camvid", "images/test", "masks/test", (11, 0, 11)),
    ],
)
def test_real_images_in_their_own_layout_are_learned_and_measured_alike(
    real_data, tmp_path, evaluated, pack, images, masks, numbers
):
    folder, run, out = real_data / pack, tmp_path / "run", tmp_path / "out"
    flags = [*CPU, *MODEL, "--head", "linear", "--crop", "64", "--short-side", "64", "--batch-size", "3"]
    assert pdvit(["segment", "--data", str(folder), "--check-masks", "--epochs", "2st", "--out", str(run), *flags]) == 0
    found = evaluated(run)
    assert len(found["iou"]) == numbers[0]
    assert found["miou"] == read_json(run / "summary.json")["miou"]
    assert pdvit(["predict", str(run), str(folder / images), "--out", str(out), *CPU]) == 0
    assert found["miou"] == pytest.approx(counted(folder / masks, out / "masks", *numbers), abs=1e-12)
    assert evaluated(run, "--ms", "--flip", "--limit", "2")["images"] == 2


def test_scales_flips_limits_and_folders_without_splits(copy, mask_folder, tmp_path, evaluated):
    flat = tmp_path / "flat"
    (copy / "predictions" / "mine.png").touch()
    one = evaluated(copy, "--limit", 1, "--out", copy)
    assert one["images"] == 1
    pictures = {path.name for path in (copy / "predictions").iterdir()}
    assert pictures == {"01-image.png", "01-truth.png", "01-prediction.png", "mine.png"}, "those of the run are gone"
    for kind in ("images", "masks"):
        shutil.copytree(mask_folder / kind / "val", flat / kind)
    shutil.copy(mask_folder / "classes.tsv", flat)
    whole = evaluated(copy, "--data", flat)
    assert (whole["images"], whole["miou"]) == (3, read_json(copy / "summary.json")["miou"])
    views = evaluated(copy, "--ms", "--flip", "--limit", 1)
    assert (len(views["scales"]), views["flip"]) == (6, True)
    assert views["loss"] != one["loss"]


def test_a_run_is_repeated_by_its_configuration_and_resumed_to_the_same_tensors(shapes, trained, tmp_path):
    """`train` repeats a run of `segment`, since the head is in run.toml; stopping changes nothing."""
    out = tmp_path / "again"
    flags = ["--config", str(trained / "run.toml"), "--out", str(out), "--stop-after", "2ep"]
    assert pdvit(["train", *flags]) == 75
    assert pdvit(["segment", "--resume", str(out), "--change", "run.stop_after=4ep"]) == 75
    assert pdvit(["segment", "--resume", str(out)]) == 0
    assert weights(out) == weights(trained)


def test_a_run_with_an_anchor_is_resumed_without_the_file_that_it_begins_from(shapes, copy, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--init", str(copy), "--gram", "9", "--drop-path", "0.2"]
    assert train(shapes, whole, *flags) == 0
    assert train(shapes, out, *flags, "--stop-after", "2ep") == 75
    shutil.rmtree(copy)
    assert pdvit(["segment", "--resume", str(out), "--change", "run.stop_after=4ep"]) == 75
    assert pdvit(["segment", "--resume", str(out)]) == 0
    assert_same(out, whole)


def test_analyze_takes_the_runs_own_images(copy, capsys):
    assert pdvit(["analyze", str(copy), "--verbose", *CPU]) == 0  # the table too: the backbone has no final norm
    assert "3 (shapes, val split" in capsys.readouterr().out
    found = read_json(copy / "analysis" / "analysis.json")
    assert (found["images_measured"], found["weights"]) == (3, "raw")
    assert "similarity_random" in (copy / "analysis.csv").read_text()


def test_one_checkpoint_is_measured_whole_and_in_windows(copy, evaluated, capsys, refusal):
    how = read_json(copy / "summary.json")
    windows = evaluated(copy, "--stride", 4)
    whole = evaluated(copy, "--eval-mode", "whole")
    assert (windows["mode"], windows["window"], windows["stride"]) == ("slide", 32, 4)
    assert whole["mode"] == "whole"
    assert pdvit(["eval", str(copy), "--eval-mode", "whole", "--stride", "7", *CPU]) == 0
    assert "--stride has no effect" in capsys.readouterr().out
    assert len({how["loss"], windows["loss"], whole["loss"]}) == 3
    again = evaluated(copy, "--eval-mode", "slide", "--stride", 21)
    assert (again["loss"], again["miou"]) == (how["loss"], how["miou"])
    assert "leave gaps" in refusal("eval", copy, "--stride", 33, *CPU).what
    assert "slide" in refusal("eval", copy, "--eval-mode", "windows", *CPU).tip


@pytest.mark.parametrize(("split", "flags"), [("val", []), ("train", ["--check-masks"])])
def test_a_mask_that_does_not_fit_is_named_before_the_start(refusal, mask_folder, tmp_path, split, flags):
    (mask_folder / "classes.tsv").write_text("0\tground\n1\tdisc\n2\tsquare\n7\tUnlabelled\n")
    Image.fromarray(np.full((40, 25), 5, np.uint8)).save(mask_folder / "masks" / split / "0.png")
    flags = ["--data", mask_folder, "--crop", 32, *MODEL, *CPU, *flags]
    refusal("segment", *flags, "--out", tmp_path / "r", where=f"{split}/0.png", tip="--classes")
    assert not (tmp_path / "r").exists()


def test_checkpoints_of_other_classes_or_of_another_task_are_refused(refusal, copy, digits_run, mask_folder):
    other, table = mask_folder, (mask_folder / "classes.tsv").read_text()
    (other / "classes.tsv").write_text(table.replace("2\tsquare", "2\tbox"))
    assert "'box'" in refusal("eval", copy, "--data", other, *CPU).what
    (other / "classes.tsv").write_text(table + "3\tmore\t#0000ff\n")
    assert "3 classes" in refusal("eval", copy, "--data", other, *CPU).what
    assert "classes of pixels" in refusal("eval", digits_run, "--data", "scenes", *CPU).what
    for flags in (["--ms"], ["--eval-mode", "whole"], ["--stride", 8]):
        refusal("eval", digits_run, *flags, *CPU, what="labels images", where=flags[0])
    assert "have no masks" in refusal("eval", copy, "--data", "digits", *CPU).what


@pytest.mark.parametrize(("head", "width"), [("linear", 512), ("upernet", 32)])
def test_the_defaults_of_the_command_have_no_unused_setting(head, width, started):
    config = started("segment", "--head", head)
    assert (unused_settings(resolve(config)), config.segment.width) == ([], width)


def test_the_search_for_a_batch_size_starts_with_one_image(shapes):
    """A batch norm of UPerNet's pooled map can't normalize one image."""
    sections = {"data": {"source": str(shapes), "batch_size": "auto", "workers": 0}, "diversity": {"preset": "none"}}
    sections |= {"segment": {"head": "upernet", "width": 8, "crop": 32, "norm": "batch"}}
    sections |= {"model": {"depth": 2, "width": 16, "heads": 1, "patch_size": 8}}
    config = build(("flags", sections))
    trial, cpu = trial_config(config), torch.device("cpu")
    task = SegmentationTask(trial, open_masks(config.data, config.segment), cpu, SINGLE_PROCESS)
    updater = Trainer(task, trial, cpu, SINGLE_PROCESS).updater
    with closing(task.batches(0)) as batches:
        batch = next(batches)
    updater(batch, 1)
    assert largest(updater, batch, 2) == 2


@pytest.mark.slow
def test_without_arguments_it_learns_the_scenes(workplace, capsys):
    assert pdvit(["segment", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["miou"] >= 0.6
