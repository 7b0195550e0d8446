"""The automatic batch size, with a CPU in the place of the GPU that it needs."""

import gc
import weakref

import torch

from pdvit.config.load import build
from pdvit.engine.terminal import RunConsole
from pdvit.engine.trainer import Trainer
from pdvit.tasks.classification import ClassificationTask
from pdvit.workflows import runs

CPU, SIZE = torch.device("cpu"), 16
TRIALS: list[weakref.ref] = []


class OnCpu(ClassificationTask):
    def __init__(self, config, source, _, ranks):
        assert [trial() for trial in TRIALS] == [None] * len(TRIALS)
        super().__init__(config, source, CPU, ranks)


def find_batch(updater, batches, _):
    """Stand for `largest_batch`, with an update of the model."""
    updater(next(batches), 1)
    TRIALS.append(weakref.ref(updater.task.module.blocks()[0]))  # hooks make a cycle of it
    return SIZE


def test_the_model_of_the_trials_is_freed_before_the_model_is_built(monkeypatch):
    monkeypatch.setattr(runs, "choose_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(runs, "set_up", lambda _, run: run)
    monkeypatch.setattr(runs, "device_name", str)
    monkeypatch.setattr(runs, "ClassificationTask", OnCpu)
    monkeypatch.setattr(runs, "Trainer", lambda task, config, _, ranks: Trainer(task, config, CPU, ranks))
    monkeypatch.setattr(runs, "largest_batch", find_batch)
    settings = {"data": {"batch_size": "auto"}, "model": {"depth": 2, "width": 16, "heads": 1, "patch_size": 8}}
    gc.disable()
    try:
        trainer = runs.build_trainer(build(("the test", settings)), RunConsole(quiet=True))
    finally:
        gc.enable()
    assert (trainer.task.batch_size, len(TRIALS), TRIALS[0]()) == (SIZE, 1, None)
