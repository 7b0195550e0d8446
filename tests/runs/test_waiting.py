"""Between two records the host never waits for the GPU: torch watches, and ends a step that would."""

import pytest
import torch

from pdvit.cli import run as pdvit
from pdvit.engine.trainer import Trainer

FIRST, LAST = 12, 24  # the steps between are watched; by then constants are on the device, and every kernel was used
FLAGS = ["--epochs", "30st", "--batch-size", "8", "--img-size", "32", "--log-interval", "6st", "--val-interval", "30st"]
EVERYTHING = ["--drop-path", "0.3", "--model-ema-decay", "0.9", "--clip-grad", "1", "--micro-batch-size", "3"]
AUGMENTED = ["--reprob", "0.5", "--smoothing", "0.1", "--shift", "2", "--mixup", "0.8"]


@pytest.fixture
def watched(monkeypatch):
    """Watch every run in this process; returns the steps of the records after which the watch went on."""
    steps, log = [], Trainer._log

    def logged(self, *arguments):
        torch.cuda.set_sync_debug_mode("default")  # here it waits, once
        log(self, *arguments)
        if FIRST <= self.state.progress.step < LAST:
            steps.append(self.state.progress.step)
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Trainer, "_log", logged)
    yield steps
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more",
    [
        [],
        [*EVERYTHING, "--precision", "bf16", "--koleo", "0.1", "--spectral", "0.1", "--cosine-schedule", "until:50%"],
        [*EVERYTHING, "--precision", "fp16", "--diversity", "released"],
        ["--data", "FOLDER", "--resident", "on", *EVERYTHING, *AUGMENTED],
        ["--data", "FOLDER", "--resident", "off", "--aa", "rand-m9-mstd0.5-inc1", *AUGMENTED],
        ["--compile"],
    ],
    ids=["plain", "bf16", "fp16", "resident files", "workers", "compiled"],
)
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_no_step_between_two_records_waits_for_the_gpu(watched, tiny, image_folder, tmp_path, more):
    flags = [str(image_folder) if flag == "FOLDER" else flag for flag in more]
    assert pdvit(["train", *tiny, "--device", "cuda", *FLAGS, *flags, "--out", str(tmp_path / "run")]) == 0
    assert watched == [12, 18]
