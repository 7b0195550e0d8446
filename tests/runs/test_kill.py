"""Kill -9 a real training process again and again: what comes out must be what an undisturbed run gives."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pdvit.cli import run as pdvit
from tests.files import assert_same, newest_step, read_json
from tests.processes import PATIENCE, start

STEPS, KILLS = 240, 20
FLAGS = ["--epochs", f"{STEPS}st", "--batch-size", "12", "--micro-batch-size", "5", "--img-size", "32"]
FLAGS += ["--model-ema-decay", "0.9", "--drop-path", "0.3", "--workers", "2", "--mixup-prob", "0.5", "--clip-grad", "1"]
FLAGS += ["--save-every", "2st", "--keep-best", "--log-interval", "3st", "--val-interval", "50st"]


def state_of(run: Path) -> dict[str, object]:
    """Return every tensor of the last checkpoint, and all facts that don't depend on the clock."""
    folder = run / "checkpoints" / (run / "checkpoints" / "last").read_text()
    facts = read_json(folder / "state.json")
    facts["progress"].pop("seconds_by_phase")
    facts["checksums"].pop("state.json")  # which is of the seconds too
    tensors = {f"{file.stem}.{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    return {name: value.numpy().tobytes() for name, value in tensors.items()} | {"facts": facts}


def disturb(process: subprocess.Popen, run: Path, rng: random.Random, during_save: bool) -> None:
    """Kill the process at a random moment after its first new record, or in the middle of a save."""
    before, deadline = newest_step(run), time.monotonic() + PATIENCE

    def waiting() -> bool:
        return process.poll() is None and time.monotonic() < deadline

    while waiting() and newest_step(run) <= before:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15))
    while during_save and waiting() and not any((run / "checkpoints").glob(".step-*")):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)


@pytest.mark.slow
def test_many_kills_change_nothing(tmp_path, tiny, image_folder):
    flags = [*tiny, *FLAGS, "--data", str(image_folder)]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert pdvit(["train", *flags, "--out", str(whole)]) == 0
    rng, kills, mid_save, lost = random.Random(0), 0, 0, []
    while True:
        arguments = ["--resume", str(run)] if (run / "run.toml").exists() else [*flags, "--out", str(run)]
        with start("train", *arguments) as process:
            if kills < KILLS:
                disturb(process, run, rng, during_save=kills % 3 == 0)
            shown = process.communicate(timeout=PATIENCE)[0]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, shown
        kills += 1
        mid_save += any((run / "checkpoints").glob(".step-*"))
        last = run / "checkpoints/last"
        lost.append(newest_step(run) - int(last.read_text()[5:]) if last.exists() else 0)
    print(f"{kills} kills, {mid_save} of them during a save; steps done again: {lost}")
    assert kills >= KILLS
    assert state_of(run) == state_of(whole)
    assert_same(run, whole)
    assert read_json(run / "status.json") == read_json(whole / "status.json")
