import argparse
import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
import typer
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver

from pdvit.cli import app
from pdvit.cli import run as pdvit
from pdvit.workflows.analyze_run import _command_to_reduce_p
from pdvit.workflows.checkpoint import OpenedCheckpoint
from pdvit.workflows.runs import saved_config
from tests.files import read_json, read_recipe, read_records, weights

VIT = "vit_tiny_patch16_224"
KWARGS = {"depth": 2, "embed_dim": 16, "num_heads": 1, "patch_size": 8}
COMMANDS = ("train", "finetune", "segment")
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


@pytest.mark.parametrize(("command", "data"), [("finetune", []), ("segment", ["--data", "scenes", "--head", "linear"])])
def test_the_advice_for_a_run_from_a_checkpoint_repeats_it_with_all_its_settings(workplace, started, command, data):
    assert pdvit([command, str(timm_saved(workplace, make())), *SHORT, *data, "--cosine", "1", "--out", "run"]) == 0
    saved = saved_config(workplace / "run", [])
    advice = _command_to_reduce_p(OpenedCheckpoint(workplace / "run", True, None, saved, None))
    assert started(*advice.split()[1:]) == replace(saved, diversity=replace(saved.diversity, cosine=2.0))


def test_a_checkpoint_of_timm_is_finetuned_and_resumed_without_its_file(workplace, capsys, refusal):
    file = timm_saved(workplace, make())
    run = workplace / "run"
    flags = ["--freeze", "1", "--gram", "9", "--save-every", "2st", "--keep", "9", "--out", str(run)]
    assert pdvit(["finetune", str(file), *SHORT, *flags]) == 0
    shown = capsys.readouterr().out
    assert "30 of 32 tensors, found under 'state_dict.'" in shown
    written = read_recipe(run)
    assert written["data"]["source"] == "digits:5-9"
    assert (written["model"]["init"], written["model"]["freeze"]) == (str(file), "1")
    assert (written["diversity"]["preset"], written["optim"]["lr"]) == ("none", 1e-3)
    ours, before = load_file(run / "model.safetensors"), make().state_dict()
    frozen = {name for name in before if name in ours and torch.equal(before[name], ours[name])}
    prefixes = ("cls_token", "pos_embed", "patch_embed", "blocks.0.")
    assert frozen == {name for name in before if name.startswith(prefixes)}
    anchor = load_file(run / "checkpoints" / "anchor.safetensors")
    assert all(torch.equal(anchor[f"model.{name}"], before[name]) for name in before if not name.startswith("head."))
    assert any(record["gram"] > 0 for record in read_records(run, "train"))
    # resumed at step 2, without its initial file and by the other command: the same tensors
    again = shutil.copytree(run, workplace / "again")
    (again / "checkpoints" / "last").write_text("step-00000002")
    (again / "status.json").write_text(json.dumps({"status": "stopped"}))
    (again / "model.safetensors").unlink()
    file.unlink()
    assert pdvit(["train", "--resume", str(again)]) == 0
    assert weights(again) == weights(run)
    assert "there is no such checkpoint" in refusal("train", "--config", run / "run.toml").what


@pytest.mark.parametrize(("classes", "rate"), [(5, 1e-3), (10, None)])
def test_a_fresh_classifier_has_a_learning_rate_of_its_own(workplace, classes, rate):
    """Ten digits: a classifier for five is fresh, one for ten stays, and trains at the rate of all."""
    save_for_hf(timm.create_model("test_vit", num_classes=classes), "saved", safe_serialization=True)
    flags = ["--data", "digits", "--epochs", "1st", "-b", "8", "--device", "cpu", "--out", "run"]
    assert pdvit(["finetune", "saved", *flags]) == 0
    optim = read_recipe(workplace / "run")["optim"]
    assert (optim["lr"], optim.get("head_lr")) == (pytest.approx(6.25e-6), rate)


@pytest.mark.slow
def test_one_half_of_the_digits_then_the_other(workplace):
    assert pdvit(["train", "--data", "digits:0-4", "--device", "cpu"]) == 0
    assert pdvit(["finetune", "runs/digits-0-4-paper", "--device", "cpu"]) == 0
    summary = read_json(workplace / "runs/digits-5-9-from-digits-0-4-paper/summary.json")
    assert summary["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("arguments", "what", "tip"),
    [
        ("", "no checkpoint to start from", "pdvit train"),
        ("a.pth --init b.pth", "two checkpoints", "one of them"),
        ("a.pth --resume run", "keeps its saved configuration, so --init", "--change"),
        ("last.pth.tar --depth 8", "30 of the backbone's 102 weights are in the file", ""),
        ("last.pth.tar --freeze backbone --diversity paper", "these terms do nothing: cosine, contrastive", ""),
    ],
)
def test_bad_input_is_named_and_trains_nothing(workplace, refusal, arguments, what, tip):
    timm_saved(workplace, make())
    refusal("finetune", *arguments.split(), *(SHORT if arguments.startswith("last") else []), what=what, tip=tip)
    assert not (workplace / "runs").exists()


def test_all_commands_that_train_have_the_same_settings(capsys):
    commands = typer.main.get_command(app).commands
    flags = {name: {item.name: tuple(item.opts) for item in commands[name].params} for name in COMMANDS}
    for name in ("finetune", "segment"):
        assert flags["train"].items() <= flags[name].items()
        assert flags[name].keys() - flags["train"].keys() == {"checkpoint"}
    pdvit(["finetune", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert all(default in help_text for default in ("digits:5-9", "(default: 12)", "(default: none)"))
