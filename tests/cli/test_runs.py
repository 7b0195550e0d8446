"""Default names of runs, and `pdvit runs`, which lists them."""

import json
import shutil
from pathlib import Path

import pytest

from pdvit.cli import run as pdvit
from pdvit.workflows.runs import default_name
from tests.files import read_json
from tests.processes import held_elsewhere


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("train", "digits-paper"),
        ("train --diversity none", "digits-none"),
        ("train --diversity none --cosine 1 --workers 4", "digits-cosine"),
        ("train --cosine 2 --seed 3", "digits-paper-cosine=2-seed=3"),
        ("train --model deit_tiny_patch16_224 --lr 2e-3 --epochs 40", "digits-paper-deit_tiny_patch16_224"),
        ("train --depth 24 --lr 3e-4 -b 64", "digits-paper-batch_size=64-depth=24-lr=0.0003"),
        ("finetune a/b.pth", "digits-5-9-from-b.pth"),
        ("finetune a/b.pth --cosine 0.5 --freeze 4 --depth 2", "digits-5-9-from-b.pth-cosine=0.5-freeze=4"),
        ("segment --head linear --cosine 1", "scenes-cosine-head=linear"),
        ("train --data scenes --diversity none --set segment.head=linear", "scenes-none-head=linear"),
        ("train --init a/b.pth", "digits-from-b.pth-paper"),
        ("train --variant released --precision bf16", "digits-paper-released-precision=bf16"),
        ("train --first embed --warmup-epochs 10% --seed 3", "digits-paper-first=embed-warmup=10%-seed=3"),
        ("train --config RUN/run.toml --epochs 40 -b 32", "digits-paper-depth=2-heads=1-patch_size=8-width=16"),
        ("train --mean 0.5 0.5 0.5 --cosine 2", "digits-paper-cosine=2-mean=0.5_0.5_0.5"),
        ("train --model-kwargs qk_norm=true --ratio 1 1.5", "digits-paper-ratio=1.0_1.5-args=qk_norm_True"),
    ],
)
def test_a_run_is_named_by_what_differs_from_its_command(digits_run, started, arguments, name):
    assert default_name(started(*arguments.replace("RUN", str(digits_run)).split())) == name


def test_runs_are_listed_with_their_numbers_and_damaged_ones_too(digits_run, workplace, capsys, monkeypatch, refusal):
    assert "pdvit train" in refusal("runs").tip
    for name in ("a long name of a run that needs more than a line", "sweep/cell", "cut", "new", "locked", "killed"):
        shutil.copytree(digits_run, workplace / "runs" / name)
    (workplace / "runs/cut/run.toml").write_text("[data")
    for file in ("status.json", "summary.json"):
        (workplace / "runs/new" / file).unlink()
    for name in ("locked", "killed"):
        (workplace / "runs" / name / "status.json").write_text('{"status": "running"}')
        (workplace / "runs" / name / "summary.json").write_text(f'{{"accuracy": NaN, "seconds": 1{400 * "0"}}}')
    capsys.readouterr()
    with held_elsewhere(Path("runs/locked")):
        assert pdvit(["runs", "--json"]) == 0
    found = {run["run"]: run for run in json.loads(capsys.readouterr().out)}
    summary = read_json(digits_run / "summary.json")
    facts = {"status": "finished", "data": "digits", "model": "vit_tiny_patch16_224", "terms": "paper"}
    numbers = {name: summary[name] for name in ("accuracy", "similarity_last", "seconds")}
    assert found.pop("runs/sweep/cell") == {"run": "runs/sweep/cell"} | facts | numbers
    assert found.pop("runs/new") == {"run": "runs/new"} | facts | {"status": "started"}
    assert found.pop("runs/cut")["status"] == "unreadable"
    assert found.pop("runs/locked") == {"run": "runs/locked"} | facts | {"status": "running"}
    assert found.pop("runs/killed") == {"run": "runs/killed"} | facts | {"status": "stopped"}
    assert len(found) == 1
    monkeypatch.setenv("COLUMNS", "80")
    assert pdvit(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "cell" in line]
    assert all(text in row for text in ("finished", "digits", "vit_tiny", "paper", f"{summary['accuracy']:.1%}"))
    assert row.split()[-4] == f"{summary['similarity_last']:.2f}"
    assert pdvit(["runs", "runs/sweep"]) == 0
    assert capsys.readouterr().out.endswith(" cell\n")


def test_the_next_command_compares_runs_of_one_task_and_model_on_the_same_data(digits_run, workplace, capsys):
    other = {"own": "", "a like one": "", "newer": 'source = "digits:0-4"', "newest": '[segment]\nhead = "linear"'}
    for name, text in (other | {"deeper": "depth = 9"}).items():
        recipe = shutil.copytree(digits_run, workplace / "runs" / name) / "run.toml"
        before = {"source": 'source = "digits"', "depth": "depth = 2"}.get(text.split(" ")[0], "[segment]")
        assert before in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(before, text or before))
        if text:
            (recipe.parent / "summary.json").touch()
    assert pdvit(["train", "--resume", "runs/own"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next      pdvit analyze 'runs/a like one' runs/own"
