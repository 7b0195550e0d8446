import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdvit.cli import run as pdvit
from pdvit.workflows import runs
from tests.files import assert_same, newest_step, read_json
from tests.processes import EARLY

STEPS, PATIENCE = 60, 120.0
# Drop path, mixing and shifts draw at random; checkpoints lie neither on log steps nor on evaluations.
FLAGS = ["--epochs", f"{STEPS}st", "--batch-size", "16", "--img-size", "16", "--drop-path", "0.3", "--shift", "2"]
FLAGS += ["--micro-batch-size", "7", "--model-ema-decay", "0.9"]
FLAGS += ["--save-every", "7st", "--log-interval", "3st", "--val-interval", "45st", "--warmup-epochs", "10st"]


def on(device: str) -> list[str]:
    """Flags of a run that gives the same bits each time; a CPU does that by itself."""
    return ["--device", device, *(["--deterministic"] if device == "cuda" else [])]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny):
    """Return a function that gives the whole run on a device, trained once."""

    @functools.cache
    def train(device: str = "cpu") -> Path:
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        assert pdvit(["train", *tiny, *FLAGS, *on(device), "--out", str(out)]) == 0
        return out

    return train


def interrupt(run: Path, flags: list[str], number: signal.Signals, past: int, closed: str = "") -> tuple[int, str]:
    """Train in a process of its own, one of its streams without a reader, and send it a signal after step `past`.

    Returns its exit status and its output.
    """
    command = [sys.executable, "-m", "pdvit", "train", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if closed:
            getattr(process, closed).close()
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and newest_step(run) <= past and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        shown = (process.stderr if closed == "stdout" else process.stdout).read()
        return process.wait(timeout=PATIENCE), shown


def same(run: Path, other: Path) -> None:
    assert_same(run, other)
    assert read_json(run / "status.json") == read_json(other / "status.json")


def test_a_killed_run_without_a_reader_goes_on_as_if_nothing_had_happened(tmp_path, tiny, uninterrupted, device):
    run = tmp_path / "run"
    flags = [*tiny, *FLAGS, *on(device), "--out", str(run)]
    assert interrupt(run, flags, signal.SIGKILL, 20, closed="stdout")[0] == -signal.SIGKILL
    assert 20 < newest_step(run) < STEPS
    assert not (run / "model.safetensors").exists()
    assert pdvit(["train", "--resume", str(run)]) == 0
    same(run, uninterrupted(device))


@pytest.mark.slow
def test_a_stopped_run_says_so_and_goes_on_without_a_reader(tmp_path, tiny, uninterrupted):
    run, copy = tmp_path / "run", tmp_path / "copy"
    status, shown = interrupt(run, [*tiny, *FLAGS, "--out", str(run)], signal.SIGTERM, 5)
    assert status == 75
    assert f"pdvit train --resume {run}" in shown
    stopped = read_json(run / "status.json")
    assert (stopped["status"], stopped["reason"]) == ("stopped", "SIGTERM")
    assert 5 < stopped["step"] < STEPS
    shutil.copytree(run, copy)
    for path, closed in ((run, "stdout"), (copy, "stderr")):
        more = ["--json"] if closed == "stderr" else []  # JSON that nobody can read is a failure
        status, shown = interrupt(path, ["--resume", str(path), *more], signal.SIGCONT, 0, closed)
        assert status == 0, shown
        assert "Traceback" not in shown
        same(path, uninterrupted())


@pytest.mark.slow
def test_a_killed_segmentation_goes_on_as_if_nothing_had_happened(tmp_path, tiny, shapes, device):
    """Crops and colours are drawn by worker processes, drop path and dropout in this one."""
    flags = ["--data", str(shapes), "--head", "upernet", "--head-width", "8", "--crop", "32", "--workers", "2"]
    flags += [*tiny, "--batch-size", "4", "--epochs", "60st", "--drop-path", "0.3", "--model-ema-decay", "0.9"]
    flags += ["--save-every", "7st", "--log-interval", "3st", "--val-interval", "25st", "--warmup-epochs", "5st"]
    flags += on(device)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert pdvit(["train", *flags, "--out", str(whole)]) == 0
    assert interrupt(run, [*flags, "--out", str(run)], signal.SIGKILL, 20)[0] == -signal.SIGKILL
    assert 20 < newest_step(run) < 60
    assert pdvit(["segment", "--resume", str(run)]) == 0
    same(run, whole)
    assert (run / "iou.csv").read_bytes() == (whole / "iou.csv").read_bytes()


def test_a_run_without_a_checkpoint_starts_over(tmp_path, digits_run):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(digits_run / "run.toml", run)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 99.0}\n{"kind": "tra')
    assert pdvit(["train", "--resume", str(run)]) == 0
    same(run, digits_run)


def test_a_finished_run_stays_as_it_is(run_copy, capsys):
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    assert pdvit(["train", "--resume", str(run_copy)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert pdvit(["train", "--resume", str(run_copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run_copy / "summary.json").read_text())
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("early", ["data", pytest.param("import", marks=pytest.mark.slow)])
def test_a_signal_before_the_first_step_ends_cleanly(tmp_path, tiny, monkeypatch, capfd, early):
    """While the data are opened, or, in a process of its own, while torch is imported."""
    command = ["train", *tiny, *FLAGS, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(runs, "resident", lambda *_: signal.raise_signal(signal.SIGTERM) or pytest.fail("it goes on"))
    if early == "data":
        status = pdvit(command)
    else:
        early_command = [sys.executable, "-c", EARLY, str(int(signal.SIGTERM)), *command]
        status = subprocess.run(early_command, timeout=PATIENCE).returncode
    shown = capfd.readouterr()
    assert (status, shown.err.strip()) == (75, "SIGTERM: stopping ...")
    assert "stopped before training began" in shown.out
    assert not (tmp_path / "run").exists()
