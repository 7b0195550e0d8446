import io
import json
import os
import signal
from itertools import count

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save
from torch import nn

from pdvit.config import build
from pdvit.engine.interrupts import stop_on_signals
from pdvit.engine.loop import Trainer
from pdvit.engine.protocol import StepOutput
from pdvit.errors import RunFailed, UserError
from pdvit.tracking import RunDirectory

CPU, PER_EPOCH, BATCH, STEPS = torch.device("cpu"), 5, 4, 20
SETTINGS = {
    "optim": {"epochs": "20st", "lr": 0.05, "warmup": "2st"},
    "run": {"log_every": "3st", "eval_every": "7st"},
    "checkpoint": {"every": "4st"},
}


class LineFit:
    """Fits a line through points of each step, with noise from the process generator, as drop path has it."""

    steps_per_epoch, batch_size, best_metric = PER_EPOCH, BATCH, "score"

    def __init__(self, at=None, event=lambda: None, infinite=False):
        torch.manual_seed(0)
        self.module = nn.Linear(3, 1)
        self.at, self.event, self.infinite = at, event, infinite

    def batches(self, start):
        for step in count(start):
            inputs = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(step))
            yield step, inputs, inputs.sum(1, keepdim=True)

    def step(self, batch):
        step, inputs, targets = batch
        assert self.module.training
        loss = (self.module(inputs + 0.1 * torch.randn_like(inputs)) - targets).square().mean()
        if step == self.at:
            self.event()
            if self.infinite:
                loss = loss * float("nan")
        return StepOutput(loss, {"loss": loss.detach()})

    def evaluate(self):
        self.module.eval()
        weight = self.module.weight.detach()[0]
        score = -float((weight - 1).abs().max())
        return {"eval": {"score": score}, "probe": {"values": weight.tolist()}}, f"score {score:.3f}"

    def finish(self):
        tensors = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        return {"task": "line"}, {"model.safetensors": save(tensors)}


def trainer_of(task, **more):
    settings = {section: SETTINGS.get(section, {}) | more.get(section, {}) for section in {*SETTINGS, *more}}
    return Trainer(task, build(("test", settings)), CPU)


def run(path, task, resume=False, **more):
    path.mkdir(exist_ok=True)
    trainer, directory = trainer_of(task, **more), RunDirectory(path)
    if resume:
        trainer.restore(directory)
    with stop_on_signals() as stop:
        return trainer.run(directory, Console(file=io.StringIO()), stop)


def read(path, name):
    return json.loads((path / name).read_text())


def records(path):
    """Return the records without what depends on the clock."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time", None)
    return lines


def interrupt(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole")
    run(path, LineFit())
    return path


def test_records_come_when_they_are_due_and_at_the_end(whole):
    by_kind = {}
    for record in records(whole):
        by_kind.setdefault(record["kind"], []).append(record["step"])
    assert by_kind == {"train": [3, 6, 9, 12, 15, 18, 20], "eval": [7, 14, 20], "probe": [7, 14, 20]}


def test_a_record_has_means_rate_and_epoch(whole):
    record = records(whole)[0]
    assert record.keys() == {"kind", "step", "epoch", "loss", "grad_norm", "lr"}
    assert record["epoch"] == 3 / PER_EPOCH
    assert record["lr"] == pytest.approx(0.05)
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert first["time"].keys() == {"seconds", "images_per_second"}


def test_records_hold_the_means_of_a_loop_by_hand(whole):
    task = LineFit()
    weight, bias = task.module.parameters()
    optimizer = torch.optim.AdamW([{"params": [bias], "weight_decay": 0.0}, {"params": [weight], "weight_decay": 0.05}])
    losses = []
    for step, batch in zip(range(3), task.batches(0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = [1e-6, (1e-6 + 0.05) / 2, 0.05][step]
        output = task.step(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert records(whole)[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_finished_run_says_so(whole):
    summary, status = read(whole, "summary.json"), read(whole, "status.json")
    assert summary.keys() == {"task", "epochs", "steps", "seconds", "images_per_second"}
    assert (summary["task"], summary["steps"], summary["epochs"]) == ("line", STEPS, STEPS / PER_EPOCH)
    scores = {record["step"]: record["score"] for record in records(whole) if record["kind"] == "eval"}
    best = max(scores, key=scores.get)
    assert (status["status"], status["step"]) == ("finished", STEPS)
    assert status["best"] == {"score": scores[best], "step": best}


def test_the_line_is_learnt(whole):
    scores = [record["score"] for record in records(whole) if record["kind"] == "eval"]
    assert scores == sorted(set(scores))


def test_the_same_run_again_is_the_same(whole, tmp_path):
    summary = run(tmp_path / "again", LineFit())
    assert summary == read(tmp_path / "again", "summary.json")
    assert records(tmp_path / "again") == records(whole)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("at", [0, 2, 3, 8, 18])
def test_a_stopped_and_resumed_run_equals_one_that_was_left_alone(whole, tmp_path, at):
    path = tmp_path / "run"
    assert run(path, LineFit(at, interrupt)) is None
    status = read(path, "status.json")
    assert (status["status"], status["step"], status["reason"]) == ("stopped", at + 1, "SIGTERM")
    assert not (path / "summary.json").exists()

    torch.manual_seed(99)
    assert run(path, LineFit(), resume=True)["steps"] == STEPS
    assert records(path) == records(whole)
    assert (path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert read(path, "status.json") == read(whole, "status.json")


def test_a_stop_in_the_last_step_is_the_end(whole, tmp_path):
    assert run(tmp_path / "run", LineFit(STEPS - 1, interrupt))["steps"] == STEPS
    assert read(tmp_path / "run", "status.json")["status"] == "finished"


def crash():
    raise ArithmeticError("struck by lightning")


def test_a_crashed_run_goes_on_from_its_last_checkpoint(whole, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(ArithmeticError):
        run(path, LineFit(10, crash))
    status = read(path, "status.json")
    assert (status["status"], status["step"]) == ("failed", 10)
    assert "struck by lightning" in status["reason"]
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    run(path, LineFit(), resume=True)
    assert records(path) == records(whole)
    assert (path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_second_sigint_leaves_a_stopped_run(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(path, LineFit(6, lambda: (interrupt(signal.SIGINT), interrupt(signal.SIGINT))))
    assert read(path, "status.json")["status"] == "stopped"


@pytest.mark.parametrize("at", [0, 4, 9, STEPS - 1])
def test_a_loss_that_is_no_number_fails_and_keeps_the_last_sound_checkpoint(tmp_path, at):
    path = tmp_path / "run"
    with pytest.raises(RunFailed, match="loss") as caught:
        run(path, LineFit(at, infinite=True))
    assert "--lr" in caught.value.tip
    status = read(path, "status.json")
    assert status["status"] == "failed"
    assert "not a number" in status["reason"]
    assert not (path / "model.safetensors").exists()
    assert all("NaN" not in line for line in (path / "metrics.jsonl").read_text().splitlines())
    kept = list((path / "checkpoints").glob("step-*/module.safetensors"))
    assert len(kept) == (at >= 4)
    for file in kept:
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_a_run_that_failed_can_be_resumed(whole, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(RunFailed):
        run(path, LineFit(9, infinite=True))
    run(path, LineFit(), resume=True)
    assert records(path) == records(whole)


def test_a_checkpoint_that_can_not_be_written_fails_the_run(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoint can't be written"):
        run(path, LineFit())
    assert read(path, "status.json")["status"] == "failed"


def test_records_that_can_not_be_written_fail_the_run(tmp_path):
    path = tmp_path / "run"
    (path / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl can't be written"):
        run(path, LineFit())
    assert read(path, "status.json")["status"] == "failed"


def test_what_can_not_work_fails_before_there_is_a_run():
    with pytest.raises(UserError, match="no optimizer"):
        trainer_of(LineFit(), optim={"opt": "nonsense"})
    with pytest.raises(UserError, match="no step"):
        trainer_of(LineFit(), optim={"epochs": "0.1st"})


def test_signal_handlers_come_back_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run(tmp_path / "run", LineFit())
    assert signal.getsignal(signal.SIGTERM) == before
