import csv
import io
import os
import re
import signal
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from pdvit.cli import evaluate
from pdvit.cli import run as pdvit
from tests.cli.conftest import CPU
from tests.files import read_csv, read_json, rewrite


@torch.no_grad()
def expected(run: Path, paths: list[Path]) -> torch.Tensor:
    """Return the probabilities of the model that timm loads, with timm's own preprocessing."""
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])).softmax(1)


def test_labels_and_probabilities_are_those_of_timm(run_copy, image_folder, device):
    top = 3
    images = [str(image_folder), str(image_folder / "val/red/0.png")]  # named twice, labelled once
    assert pdvit(["predict", str(run_copy), *images, "--top", str(top), *CPU, "--device", device]) == 0
    rows, paths = read_csv(run_copy / "predictions.csv"), sorted(image_folder.rglob("*.png"))
    best = expected(run_copy, paths).topk(top)
    assert list(rows[0]) == ["image", "rank", "label", "probability"]
    assert [row["image"] for row in rows] == [str(path) for path in paths for _ in range(top)]
    assert [int(row["rank"]) for row in rows] == [rank + 1 for _ in paths for rank in range(top)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(best.values.flatten().tolist(), abs=1e-5)
    assert [int(row["label"]) for row in rows if row["rank"] == "1"] == best.indices[:, 0].tolist()


def test_names_of_any_kind_survive(run_copy, image_folder, workplace):
    sound = (image_folder / "val/red/0.png").read_bytes()
    names = ["a,b.png", 'say "x".png', "two\nlines.png", "re\rturn.png", "日本.png", " space .png", "[red].png"]
    names += ["=1+1.png", os.fsdecode(b"\xff.png")]
    Path("odd").mkdir()
    for name in names:
        Path("odd", name).write_bytes(sound)
    assert pdvit(["predict", str(run_copy), "odd", "--out", "mine/labels.csv", *CPU]) == 0
    assert {row["image"] for row in read_csv(Path("mine/labels.csv"))} == {f"odd/{name}" for name in names}
    assert [path.name for path in Path("mine").iterdir()] == ["labels.csv"]


@pytest.mark.slow
def test_labels_are_the_names_of_the_checkpoint_and_else_numbers(run_copy, image_folder):
    image, config, found = image_folder / "val/red/0.png", read_json(run_copy / "config.json"), []
    for names in ([f"digit {number}" for number in range(10)], None):
        rewrite(run_copy, config=config | {"label_names": names})
        assert pdvit(["predict", str(run_copy), str(image), *CPU]) == 0
        found += [row["label"] for row in read_csv(run_copy / "predictions.csv")]
    assert found[0] == f"digit {found[1]}"


def test_standard_output_gets_the_csv_and_nothing_else(run_copy, image_folder, capsysbinary):
    capsysbinary.readouterr()
    assert pdvit(["predict", str(run_copy), str(image_folder / "val"), "--out", "-", *CPU]) == 0
    shown = capsysbinary.readouterr()
    assert len(list(csv.DictReader(io.StringIO(shown.out.decode(), newline="")))) == 6
    assert b"6 images labelled" in shown.err
    assert not (run_copy / "predictions.csv").exists()


def test_a_few_images_are_shown(run_copy, image_folder, capsys, monkeypatch):
    monkeypatch.chdir(image_folder)
    assert pdvit(["predict", str(run_copy), "val/red", "--top", "2", *CPU]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^val/red/0\.png\n( +\d+\.\d%  \d\n){2}", shown, re.MULTILINE)  # the name on a line of its own
    assert shown.count("%") == 4
    assert str(run_copy / "predictions.csv") in shown
    assert pdvit(["predict", str(run_copy), "train", *CPU]) == 0
    assert "%" not in capsys.readouterr().out


def test_a_signal_leaves_the_file_of_before_and_nothing_else(run_copy, image_folder, monkeypatch, capsys):
    def signalled(*arguments):
        found = whole(*arguments)
        yield next(found)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from found

    whole = evaluate._labels
    monkeypatch.setattr(evaluate, "_labels", signalled)
    (run_copy / "predictions.csv").write_text("of before")
    before = sorted(run_copy.rglob("*"))
    assert pdvit(["predict", str(run_copy), str(image_folder), *CPU]) == 75
    assert "stopped; no file was written" in capsys.readouterr().out
    assert sorted(run_copy.rglob("*")) == before
    assert (run_copy / "predictions.csv").read_text() == "of before"


def test_bad_images_are_named_or_left_out_and_counted(image_folder, run_copy, refusal, capsys):
    for number in range(12):
        (image_folder / "train" / "red" / f"bad-{number:02}.png").write_text("no image")
    (image_folder / "val" / "red" / "0.png").write_bytes(b"")
    (run_copy / "predictions.csv").write_text("of before")
    found = refusal("predict", run_copy, image_folder / "train", *CPU, tip="--on-bad-image skip")
    assert found.where.count("bad-") == 10
    assert (run_copy / "predictions.csv").read_text() == "of before"
    arguments = [str(run_copy), str(image_folder), "--on-bad-image", "skip", "--batch-size", "4", *CPU]
    assert pdvit(["predict", *arguments]) == 0
    images = [row["image"] for row in read_csv(run_copy / "predictions.csv")]
    sound = [path for path in sorted(image_folder.rglob("*.png")) if path.read_bytes().startswith(b"\x89PNG")]
    assert images == [str(path) for path in sound]
    shown = capsys.readouterr().out
    assert "29 images labelled, 13 skipped" in shown
    assert "bad-00.png (not an image)" in shown


def test_options_that_do_not_fit_and_logits_that_are_no_numbers(refusal, run_copy, image_folder, tmp_path):
    assert "10 classes" in refusal("predict", run_copy, image_folder, "--top", 11).what
    assert "folder" in refusal("predict", run_copy, image_folder, "--out", tmp_path).what
    tensors = load_file(run_copy / "model.safetensors")
    rewrite(run_copy, tensors | {"head.weight": torch.full_like(tensors["head.weight"], 3e38)})
    assert "0.png" in refusal("predict", run_copy, image_folder, *CPU).what
    assert not (run_copy / "predictions.csv").exists()
