"""Real images with masks, in the layouts that they come in: trained for a moment, measured, and counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdvit.cli import run as pdvit

CPU = ["--device", "cpu", "--workers", "0"]
MODEL = ["--depth", "2", "--width", "16", "--heads", "1", "--patch-size", "8", "--head", "linear", "--crop", "64"]
SMALL = ["--short-side", "64", "--batch-size", "3", "--epochs", "2st"]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pack", "images", "masks", "numbers"),
    [
        ("ade20k-sample/ADEChallengeData2016", "images/validation", "annotations/validation", (150, 1, 0)),
        ("camvid", "images/test", "masks/test", (11, 0, 11)),
    ],
)
def test_a_pack_in_its_own_layout_is_learned_and_its_miou_is_that_of_the_written_masks(
    real_data, tmp_path, capsys, pack, images, masks, numbers
):
    folder, run = real_data / pack, tmp_path / "run"
    assert pdvit(["segment", "--data", str(folder), "--check-masks", "--out", str(run), *CPU, *MODEL, *SMALL]) == 0
    capsys.readouterr()
    assert pdvit(["eval", str(run), "--json", *CPU]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["iou"]) == numbers[0]
    assert found["miou"] == json.loads((run / "summary.json").read_text())["miou"]
    assert pdvit(["predict", str(run), str(folder / images), "--out", str(tmp_path / "out"), *CPU]) == 0
    assert found["miou"] == pytest.approx(counted(folder / masks, tmp_path / "out" / "masks", *numbers), abs=1e-12)
    capsys.readouterr()
    assert pdvit(["eval", str(run), "--json", "--ms", "--flip", "--limit", "2", *CPU]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
