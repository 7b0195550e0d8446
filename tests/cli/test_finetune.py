import argparse
import json
import shutil
import tomllib

import pytest
import timm
import torch
import typer
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver

from pdvit.cli import app
from pdvit.cli import run as pdvit

VIT = "vit_tiny_patch16_224"
KWARGS = {"depth": 2, "embed_dim": 16, "num_heads": 1, "patch_size": 8}
SHORT = ["--epochs", "4st", "--batch-size", "64", "--device", "cpu", "--log-interval", "1st"]


def make(**more):
    torch.manual_seed(0)
    return timm.create_model(VIT, **KWARGS | {"img_size": 32, "num_classes": 10} | more)


def timm_saved(folder, model):
    """Return a checkpoint as timm's training script leaves it."""
    args = argparse.Namespace(model=VIT, img_size=32, num_classes=10, model_kwargs=KWARGS, drop_path=None)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), 0.1), args, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, 0.5)
    return folder / "last.pth.tar"


def recipe(run):
    return tomllib.loads((run / "run.toml").read_text())


def refused(capsys, *arguments):
    assert pdvit([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_checkpoint_of_timm_is_finetuned_and_goes_on_without_its_file(workplace, capsys):
    file = timm_saved(workplace, make())
    run = workplace / "run"
    flags = ["--freeze", "1", "--save-every", "2st", "--keep", "9", "--out", str(run)]
    assert pdvit(["finetune", str(file), *SHORT, *flags]) == 0
    said = capsys.readouterr().out
    assert "begins with last.pth, raw weights: 30 of 32 tensors, found under 'state_dict.'" in said
    assert "fresh: 2 (head.bias, head.weight)" in said
    written = recipe(run)
    assert written["data"]["source"] == "digits:5-9"
    assert (written["model"]["init"], written["model"]["freeze"]) == (str(file), "1")
    assert (written["diversity"]["preset"], written["optim"]["lr"]) == ("none", 1e-3)
    ours, before = load_file(run / "model.safetensors"), make().state_dict()
    frozen = {name for name in before if name in ours and torch.equal(before[name], ours[name])}
    assert frozen == {
        name for name in before if name.startswith(("cls_token", "pos_embed", "patch_embed", "blocks.0."))
    }
    # timm reads what came out, with the same logits
    theirs = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    mirror = make(num_classes=5).eval()
    mirror.load_state_dict(ours)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(theirs(images), mirror(images))
    # taken up at step 2, without the file that it began with, and by the other command: the same tensors
    again = shutil.copytree(run, workplace / "again")
    (again / "checkpoints" / "last").write_text("step-00000002")
    (again / "status.json").write_text(json.dumps({"status": "stopped"}))
    (again / "model.safetensors").unlink()
    file.unlink()
    assert pdvit(["train", "--resume", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert refused(capsys, "train", "--config", run / "run.toml").startswith("error: there is no such checkpoint")


@pytest.mark.slow
def test_one_half_of_the_digits_then_the_other(workplace):
    assert pdvit(["train", "--data", "digits:0-4", "--device", "cpu"]) == 0
    assert pdvit(["finetune", "runs/digits-0-4-paper", "--device", "cpu"]) == 0
    summary = json.loads((workplace / "runs/digits-5-9-from-digits-0-4-paper/summary.json").read_text())
    assert summary["accuracy"] > 0.8


@pytest.mark.slow
def test_a_linear_probe_leaves_the_backbone_as_it_was(workplace, capsys):
    save_for_hf(make(), str(workplace / "hub"), safe_serialization=True)
    assert pdvit(["finetune", "hub", *SHORT, "--freeze", "backbone", "--mixing", "1", "--out", "run"]) == 0
    ours, before = load_file(workplace / "run/model.safetensors"), make().state_dict()
    assert {name for name in before if not torch.equal(before[name], ours[name])} == {"head.weight", "head.bias"}


@pytest.mark.slow
def test_at_another_resolution_with_the_terms_and_layer_decay(workplace, capsys):
    save_for_hf(make(), str(workplace / "hub"), safe_serialization=True)
    flags = ["--img-size", "48", "--diversity", "paper", "--layer-decay", "0.7", "--out", "run"]
    assert pdvit(["finetune", "hub", *SHORT, *flags]) == 0
    assert "resampled: 1 (pos_embed)" in capsys.readouterr().out
    assert timm.create_model("local-dir:run", pretrained=True).pos_embed.shape == (1, 37, 16)


def test_without_a_checkpoint_there_is_a_tip(workplace, capsys):
    error = refused(capsys, "finetune")
    assert "no checkpoint to start from" in error
    assert "pdvit finetune RUN" in error


def test_two_checkpoints_are_refused(workplace, capsys):
    assert "two checkpoints" in refused(capsys, "finetune", "a.pth", "--init", "b.pth")


def test_a_run_that_is_taken_up_has_its_checkpoint_already(workplace, capsys):
    assert "keeps its saved configuration, so --init" in refused(capsys, "finetune", "a.pth", "--resume", "run")


def test_a_checkpoint_that_does_not_fit_trains_nothing(workplace, capsys):
    file = timm_saved(workplace, make())
    error = refused(capsys, "finetune", file, *SHORT, "--depth", "8")
    assert "30 of the backbone's 102 weights are in the file (missing: 72" in error
    assert not (workplace / "runs").exists()


def test_terms_without_effect_are_refused(workplace, capsys):
    file = timm_saved(workplace, make())
    error = refused(capsys, "finetune", file, *SHORT, "--freeze", "backbone", "--diversity", "paper")
    assert "these terms do nothing: cosine, contrastive" in error


def test_finetune_takes_what_train_takes_and_a_checkpoint():
    commands = typer.main.get_command(app).commands
    taken = {name: {item.name: tuple(item.opts) for item in commands[name].params} for name in ("train", "finetune")}
    extra = taken["finetune"].items() - taken["train"].items()
    assert taken["train"].items() <= taken["finetune"].items()
    assert {name for name, _ in extra} == {"checkpoint"}


def test_the_defaults_are_said(workplace, capsys):
    pdvit(["finetune", "--help"])
    help_text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "digits:5-9" in help_text
    assert "(default: 12)" in help_text
    assert "(default: none)" in help_text


def test_analyze_reads_a_training_file_of_timm(workplace, capsys):
    file = timm_saved(workplace, make())
    assert pdvit(["analyze", str(file), "--json", "--device", "cpu", "--images", "digits", "--limit", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == "raw"
    assert pdvit(["analyze", str(file), "--weights", "ema"]) == 2
