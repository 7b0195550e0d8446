"""`pdvit train --config` with a [sweep] table, as a user sees it."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pdvit.cli import run as pdvit
from pdvit.cli.sweep import _watch, devices_of
from pdvit.config.schema import Config, LaunchConfig
from pdvit.engine.terminal import StopRequest
from pdvit.launch import Jobs
from pdvit.sweep import Folder, make_cells
from pdvit.tracking.run_directory import RunDirectory
from pdvit.workflows.console import make_console
from tests.files import assert_same, newest_step, read_csv, read_json
from tests.processes import finish, start, wait

BASE = """
data = { img_size = 16, batch_size = 16 }
model = { depth = 2, width = 16, heads = 1, patch_size = 8 }
optim = { epochs = "STEPSst", warmup = "1st" }
checkpoint = { every = "5st" }
run = { device = "cpu", log_every = "1st" }
[sweep]
"""
TWO = '"run.seed" = [0]\n[[sweep.variant]]\nname = "none"\n"diversity.preset" = "none"\n'
TWO += '[[sweep.variant]]\nname = "paper"\n'
STEPS = 150


def write(place: Path, sweep: str = TWO, steps: int = 2) -> Path:
    file = place / "tiny.toml"
    file.write_text(BASE.replace("STEPS", str(steps)) + sweep)
    return file


def statuses(folder: Path) -> list[str]:
    return [row["status"] for row in read_csv(folder / "cells.csv")]


def test_every_cell_is_the_run_that_one_would_start_by_hand(workplace, tiny, capsys):
    write(workplace)
    assert pdvit(["train", "--config", "tiny.toml", "--json"]) == 0
    sweep = workplace / "runs" / "tiny"
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["sweep"], [cell["status"] for cell in found["cells"]]) == ("runs/tiny", ["finished"] * 2)
    assert "cell 2 of 2: paper-seed=0: finished in" in shown.err
    assert "test accuracy" in shown.err
    for row, preset in zip(read_csv(sweep / "cells.csv"), ("none", "paper"), strict=True):
        flags = [*tiny, "--img-size", "16", "--batch-size", "16", "--epochs", "2st", "--warmup-epochs", "1st"]
        assert pdvit(["train", *flags, "--log-interval", "1st", "--diversity", preset, "--out", preset]) == 0
        assert_same(sweep / row["name"], workplace / preset)
        summary = read_json(workplace / preset / "summary.json")
        for name in ("accuracy", "loss", "similarity_first", "similarity_last"):
            assert float(row[name]) == summary[name]
        assert (row["variant"], row["run.seed"], row["status"]) == (preset, "0", "finished")
        assert "cores" in row["hardware"]
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("*-seed=0/*")}
    capsys.readouterr()
    assert pdvit(["train", "--config", "tiny.toml"]) == 0
    assert "2 cells in runs/tiny, 0 to run now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*-seed=0/*")} == before


def test_a_mistake_in_any_cell_is_found_before_the_first_begins(workplace, refusal):
    write(workplace, '"optim.lr" = [1e-3, 1e-2, -1]\n')
    refusal("train", "--config", "tiny.toml", where="cell 3 (lr=-1) of [sweep] of tiny.toml")
    write(workplace, '[[sweep.variant]]\nname = "a"\n"model.init" = "x"\n[[sweep.variant]]\nname = "b"\n')
    refusal("finetune", "--config", "tiny.toml", what="no checkpoint to start from", where="cell 2 (b)")
    assert not (workplace / "runs").exists()
    write(workplace, '"model.name" = ["vit_tiny_patch16_224", "vit_tny_patch16_224"]\n')
    refusal("train", "--config", "tiny.toml", where="cell 2 (name=vit_tny_patch16_224)", tip="vit_tiny")
    assert statuses(workplace / "runs" / "tiny") == ["waiting", "waiting"]


def test_cells_are_listed_and_cancelled_before_anything_is_written(workplace, capsys, monkeypatch):
    write(workplace)
    assert pdvit(["train", "--config", "tiny.toml", "--cells", "list", "--out", "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["2 cells in x", "    1  none-seed=0   waiting", "    2  paper-seed=0  waiting"]
    assert pdvit(["train", "--config", "tiny.toml", "--cells", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["cells"][1] == {"cell": 2, "name": "paper-seed=0", "status": "waiting", "reason": ""}
    assert [path.name for path in workplace.iterdir()] == ["tiny.toml"]
    monkeypatch.setattr("pdvit.cli.sweep._check", lambda folder, _: pdvit(["sweep", "cancel", str(folder.path)]) or [])
    assert pdvit(["train", "--config", "tiny.toml"]) == 75
    assert not (workplace / "runs" / "tiny" / "jobs" / "jobs.json").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_cell_whose_process_ended_failed_unless_it_is_resumed(workplace, monkeypatch, resumed):
    folder, jobs = Folder(workplace / "sweep"), Jobs(workplace / "sweep")
    table, found = {"run.seed": [0]}, iter([{"seed=0": "RUNNING"}])
    folder.begin({}, table, cells := make_cells({}, table, "x.toml"))
    RunDirectory(folder.path / "seed=0").mark("running", "")
    monkeypatch.setattr(jobs, "states", lambda: next(found, {}))
    monkeypatch.setattr(jobs, "log", lambda name: Path("log"))
    monkeypatch.setattr(RunDirectory, "held", lambda run: resumed)  # by a command that trains the cell
    config = Config(launch=LaunchConfig("local"))
    _watch(folder, jobs, cells, config, make_console(as_json=False), StopRequest(), {}, [None])
    assert statuses(folder.path) == ["running" if resumed else "failed"]


@pytest.mark.parametrize(
    ("arguments", "what", "where"),
    [
        (["--cells", "3"], "no cells '3'", "--cells"),
        (["--seed", "1"], "the sweep sets run.seed", "the command line"),
        (["--set", "diversity.preset=none"], "the sweep sets diversity.preset", "--set"),
        (["--set", "sweep.run.seed=[1]"], "there is no section 'sweep'", "--set"),
        (["--epochs", "0"], "out of range", "the command line"),
        (["torchrun"], "several processes", "the environment"),
    ],
)
def test_what_does_not_go_with_a_sweep_is_refused(workplace, refusal, monkeypatch, arguments, what, where):
    write(workplace)
    if arguments == ["torchrun"]:
        arguments = []
        monkeypatch.setenv("WORLD_SIZE", "2")
    refusal("train", "--config", "tiny.toml", *arguments, what=what, where=where)
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("devices", "gpus", "processes"),
    [
        (["auto", "cuda"], ["0", "1", "GPU-x"], {1: ["0", "1", "GPU-x"], 2: ["0,1"], 3: ["0,1,GPU-x"]}),
        (["cuda:1", "auto"], ["0", "1"], {1: ["7"]}),
        (["auto"], ["3"], {1: ["7"]}),
    ],
)
def test_there_is_one_cell_per_gpu_unless_a_cell_names_its_device(devices, gpus, processes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    cells = make_cells({}, {"run.device": devices}, "x.toml")
    assert {each: devices_of(cells, gpus, LaunchConfig(gpus=each)) for each in processes} == processes
    assert devices_of(cells, gpus, LaunchConfig(parallel=4)) == (4 * processes[1])[:4]


def command(*arguments: str, place: Path | None = None) -> subprocess.Popen[str]:
    """Start a sweep in a process group of its own."""
    return start("train", "--config", "tiny.toml", *arguments, start_new_session=True, cwd=place)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A sweep that nobody disturbs."""
    place = tmp_path_factory.mktemp("undisturbed")
    write(place, steps=STEPS)
    finish(command("--out", "whole", place=place), 0)
    return place / "whole"


def same(sweep: Path, other: Path) -> None:
    assert statuses(sweep) == ["finished"] * 2
    for name in ("none-seed=0", "paper-seed=0"):
        assert_same(sweep / name, other / name)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["everybody", "the sweep", "the cell"])
def test_a_sweep_that_is_killed_goes_on(workplace, undisturbed, whom):
    write(workplace, steps=STEPS)
    sweep = workplace / "runs" / "tiny"
    process = command()
    wait(lambda: newest_step(sweep / "none-seed=0") >= 20, sweep)
    assert statuses(sweep) == ["running", "waiting"]
    job = read_json(sweep / "jobs" / "jobs.json")["none-seed=0"][1]
    cell = int(Path(f"/proc/{job}/task/{job}/children").read_text())
    if whom != "the cell":  # alone, it goes on
        process.kill()
    if whom != "the sweep":
        os.kill(cell, signal.SIGKILL)
    if whom == "the cell":  # a failure like another: passed over, and tried again when asked
        assert "none-seed=0: failed: its process ended" in finish(process, 1)
        assert statuses(sweep) == ["failed", "finished"]
        assert "0 to run now" in finish(command(), 1)
        finish(command("--cells", "failed"), 0)
    else:
        finish(process, -signal.SIGKILL)
        finish(command(), 0)
    same(sweep, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupted", "terminated", "time limit"])
def test_a_sweep_that_is_stopped_goes_on(workplace, undisturbed, how):
    write(workplace, steps=STEPS)
    sweep = workplace / "runs" / "tiny"
    process = command(*(["--time-limit", "0.1s"] if how == "time limit" else []))
    if how != "time limit":
        wait(lambda: newest_step(sweep / "none-seed=0") >= 20, sweep)
        if how == "interrupted":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
    assert "the same command resumes the sweep" in finish(process, 75)
    assert statuses(sweep)[1] == "waiting"
    finish(command(), 0)
    same(sweep, undisturbed)


@pytest.mark.slow
def test_cells_run_at_the_same_time_and_can_be_cancelled(workplace, capsys):
    write(workplace, TWO.replace("[0]", "[0, 1]"), steps=100_000)
    sweep = workplace / "runs" / "tiny"
    process = command("--parallel", "2", "--cpus", "1")
    for name in ("none-seed=0", "paper-seed=0"):
        wait(lambda name=name: newest_step(sweep / name) >= 1, name)
        assert read_json(sweep / name / "environment.json")["threads"] == 1
    assert "another command runs this" in finish(command(), 2)
    assert pdvit(["sweep", "status", str(sweep)]) == 0
    assert capsys.readouterr().out.count("running   job ") == 2
    assert pdvit(["sweep", "cancel", str(sweep)]) == 0
    assert capsys.readouterr().out == "cancelled: 2 jobs\n"
    assert "the same command resumes the sweep" in finish(process, 75)
    assert statuses(sweep) == ["stopped", "stopped", "waiting", "waiting"]
