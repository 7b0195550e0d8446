import io
import json
import math
import signal
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdvit.config import build
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.engine.recovery import largest, replay
from pdvit.engine.terminal import STOPPING, stop_on_signals
from pdvit.engine.trainer import Trainer
from pdvit.errors import RunFailed, UserError
from pdvit.tracking.run_directory import RunDirectory
from tests.files import assert_same, read_json, read_records

CPU, PER_EPOCH, BATCH, STEPS = torch.device("cpu"), 5, 4, 20
SETTINGS = {
    "optim": {"epochs": "20st", "lr": 0.05, "warmup": "2st"},
    "run": {"log_every": "3st", "eval_every": "7st"},
    "checkpoint": {"every": "4st"},
}


@dataclass(frozen=True)
class Points:
    step: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self):
        return len(self.inputs)

    def split(self, size):
        return [Points(*part) for part in zip(*(value.split(size) for value in vars(self).values()), strict=True)]

    def repeat(self, size):
        return self


class LineFit:
    """Fits a line through points of each step, with noise from the process generator, as drop path has it."""

    steps_per_epoch, batch_size, best_metric, anchor = PER_EPOCH, BATCH, "score", None

    def __init__(self, at=None, event=lambda: None, infinite=False, steps=1):
        torch.manual_seed(0)
        self.module = nn.Linear(3, 1)
        self.fingerprint = {"points": {"images": PER_EPOCH * BATCH, "hash": "1"}}
        self.at, self.event, self.infinite, self.steps = at, event, infinite, steps

    def batches(self, start):
        for step in count(start):
            inputs = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(step))
            yield Points(torch.full((BATCH,), step), inputs, inputs.sum(1, keepdim=True))

    def step(self, network, batch):
        step, inputs, targets = int(batch.step[0]), batch.inputs, batch.targets
        assert network.training
        loss = (network(inputs + 0.1 * torch.randn_like(inputs)) - targets).square().mean()
        if self.at is not None and self.at <= step < self.at + self.steps:
            self.event()
            if self.infinite:
                loss = loss * float("nan")
        return loss, {"loss": loss.detach()}

    def evaluate(self, network):
        network.eval()
        weight = network.weight.detach()[0]
        score = -float((weight - 1).abs().max())
        return {"eval": {"score": score}, "probe": {"values": weight.tolist()}}, f"score {score:.3f}"

    def finish(self, network, weights):
        return {"task": "line", "weights": weights}

    def export(self, state, weights):
        return {"model.safetensors": save(dict(state))}


def trainer_of(task, **more):
    settings = {section: SETTINGS.get(section, {}) | more.get(section, {}) for section in {*SETTINGS, *more}}
    return Trainer(task, build(("test", settings)), CPU, Ranks())


def run(path, task, resume=False, changed=None, **more):
    path.mkdir(exist_ok=True)
    trainer, directory = trainer_of(task, **more), RunDirectory(path)
    if resume:
        trainer.restore(directory, changed or {})
    with stop_on_signals(trainer.ranks.stop):
        return trainer.run(directory, Console(file=io.StringIO()))


def interrupt(number=signal.SIGTERM):
    signal.raise_signal(number)


def ended(path):
    status = read_json(path / "status.json")
    return status["status"], status["step"], status.get("reason")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole")
    run(path, LineFit())
    return path


def test_records_come_when_they_are_due_and_at_the_end(whole):
    by_kind = {}
    for record in read_records(whole):
        by_kind.setdefault(record["kind"], []).append(record["step"])
    assert by_kind == {"train": [3, 6, 9, 12, 15, 18, 20], "eval": [7, 14, 20], "probe": [7, 14, 20]}


def test_records_hold_the_means_of_a_loop_by_hand(whole):
    task = LineFit()
    weight, bias = task.module.parameters()
    optimizer = torch.optim.AdamW([{"params": [bias], "weight_decay": 0.0}, {"params": [weight], "weight_decay": 0.05}])
    losses = []
    for step, batch in zip(range(3), task.batches(0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = [1e-6, (1e-6 + 0.05) / 2, 0.05][step]
        loss, _ = task.step(task.module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    record = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert (record["epoch"], record["skipped"], record["lr"]) == (3 / PER_EPOCH, 0, pytest.approx(0.05))
    assert record["time"].keys() == {"seconds", "images_per_second", "peak_memory_mb", "data", "step"}


@pytest.mark.parametrize("at", [0, 3, 8, 18])
def test_a_stopped_and_resumed_run_equals_one_that_was_left_alone(whole, tmp_path, at):
    path = tmp_path / "run"
    assert run(path, LineFit(at, interrupt)) is None
    assert ended(path) == ("stopped", at + 1, "SIGTERM")
    assert not (path / "summary.json").exists()

    torch.manual_seed(99)
    assert run(path, LineFit(), resume=True)["steps"] == STEPS
    assert_same(path, whole)
    assert read_json(path / "status.json") == read_json(whole / "status.json")


@pytest.mark.parametrize(
    ("phase", "call", "step"), [("batches", 8, 7), ("evaluate", 1, 7), ("evaluate", 3, 20), ("finish", 1, 20)]
)
def test_a_signal_leaves_a_wait_or_an_evaluation_at_once_and_the_resumed_run_repeats_it(
    whole, tmp_path, phase, call, step
):
    path, task, calls = tmp_path / "run", LineFit(), count(1)
    plain = getattr(task, phase)

    def interrupted(*arguments):
        if next(calls) == call:
            interrupt()
            pytest.fail("it goes on")
        return arguments[0] if phase == "batches" else plain(*arguments)

    waiting = lambda start: (interrupted(batch) for batch in plain(start))  # noqa: E731
    setattr(task, phase, waiting if phase == "batches" else interrupted)
    assert run(path, task) is None
    assert ended(path) == ("stopped", step, "SIGTERM")
    run(path, LineFit(), resume=True)
    assert_same(path, whole)


def test_the_time_limit_counts_from_the_start_of_the_command(tmp_path):
    trainer = trainer_of(LineFit(), run={"time_limit": "1h"})
    trainer.ranks.stop.created -= 3600
    assert trainer.run(RunDirectory(tmp_path), Console(file=io.StringIO())) is None
    assert (read_json(tmp_path / "status.json")["step"], trainer.ranks.stop.reason) == (1, "time limit")


def test_a_crashed_run_goes_on_from_its_last_checkpoint(whole, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        run(path, LineFit(10, lambda: 1 / 0))
    assert ended(path) == ("failed", 10, "ZeroDivisionError: division by zero")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    run(path, LineFit(), resume=True)
    assert_same(path, whole)


def test_a_second_sigint_leaves_a_stopped_run(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(path, LineFit(6, lambda: (interrupt(signal.SIGINT), interrupt(signal.SIGINT))))
    assert read_json(path / "status.json")["status"] == "stopped"


@pytest.mark.parametrize(("at", "logged"), [(0, 3), (9, 12), (STEPS - 1, 20)])
def test_a_step_whose_loss_is_no_number_is_skipped_and_counted(tmp_path, at, logged):
    assert run(tmp_path / "run", LineFit(at, infinite=True))["steps_skipped"] == 1
    records = read_records(tmp_path / "run", "train")
    assert [record["step"] for record in records if record["skipped"]] == [logged]
    assert all(math.isfinite(record["loss"]) for record in records)


def test_a_stop_on_a_skipped_step_is_saved(tmp_path):
    path, whole = tmp_path / "run", tmp_path / "whole"
    assert run(path, LineFit(10, infinite=True), run={"stop_after": "11st"}) is None
    assert kept(path) == [11]
    run(path, LineFit(), resume=True, changed={"run.stop_after": None})
    run(whole, LineFit(10, infinite=True))
    assert (path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_that_learned_nothing_fails_however_short(tmp_path):
    with pytest.raises(RunFailed, match="3 of 4 steps"):
        run(tmp_path / "skipped", LineFit(0, infinite=True, steps=3), optim={"epochs": "4st"})
    task = LineFit()
    task.finish = lambda *_: {"loss": math.nan}
    with pytest.raises(RunFailed, match="loss on held-out images is nan"):
        run(tmp_path / "nan", task)
    for name in ("skipped", "nan"):
        assert read_json(tmp_path / name / "status.json")["status"] == "failed"
        assert not (tmp_path / name / "model.safetensors").exists()


def test_trials_of_memory_compile_nothing():
    trainer = trainer_of(LineFit(), run={"compile": True})
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert largest(trainer.updater, next(trainer.task.batches(0)), 3) == 3
    assert not torch._dynamo.utils.counters["frames"]


def test_several_bad_steps_in_a_row_end_the_run_and_can_be_replayed_and_left_behind(whole, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(RunFailed, match="in a row"):
        run(path, LineFit(9, infinite=True, steps=STEPS))
    assert kept(path) == [8]
    # A replay computes the saved step again.
    bad = trainer_of(LineFit(9, infinite=True, steps=STEPS))
    step, metrics, broken = replay(path, bad.state, bad.updater)
    assert step == 15  # of the record at which five in a row were seen
    assert math.isnan(metrics["loss"])
    assert broken == ["weight", "bias"]

    task = LineFit()
    task.step = lambda module, _: (module.weight.sum() + math.nan * module.bias.sum(), {})
    clipped = trainer_of(task, optim={"clip_grad": 1.0})
    assert replay(path, clipped.state, clipped.updater)[2] == ["bias"]

    clean = trainer_of(LineFit())  # the same step without its trouble
    _, metrics, broken = replay(path, clean.state, clean.updater)
    assert broken == []
    weight, bias = clean.task.module.parameters()
    batch = next(LineFit().batches(14))
    torch.set_rng_state(load_file(path / "replay/step-00000015/state.safetensors")["0.generator.cpu"])
    expected = (batch.inputs + 0.1 * torch.randn_like(batch.inputs)) @ weight.T + bias - batch.targets
    assert metrics["loss"] == pytest.approx(expected.square().mean().item(), rel=1e-6)
    with pytest.raises(UserError, match="no step to replay"):
        replay(whole, clean.state, clean.updater)
    # Resumed without its trouble: the saved step is removed by the first checkpoint after it.
    assert run(path, LineFit(9, interrupt), resume=True) is None
    assert (path / "replay").is_dir()
    run(path, LineFit(), resume=True)
    assert not (path / "replay").exists()
    assert read_records(path) == read_records(whole)


@pytest.mark.parametrize("limit", [1, 5, 8, 300])
@pytest.mark.parametrize("memory", [0, 1, 7, 8, 300])
def test_the_largest_power_of_two_or_the_limit_that_fits_is_found(limit, memory):
    def backward(images, micro_batch):
        assert images == micro_batch <= limit
        if images > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")

    updater, batch = SimpleNamespace(backward=backward), SimpleNamespace(repeat=lambda size: size)
    powers = [2**power for power in range(10) if 2**power <= min(limit, memory)]
    assert largest(updater, batch, limit) == (limit if limit <= memory else max(powers, default=0))
    updater.backward = lambda images, micro_batch: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):  # an error that is not about memory
        largest(updater, batch, limit)


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_asks_and_a_second_sigint_interrupts_at_once(number):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(number)
        assert (bool(stop), stop.reason) == (True, number.name)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) == before


def test_lost_records_are_reported_once(tmp_path):
    path = tmp_path / "run"
    run(path, LineFit(8, interrupt))
    assert trainer_of(LineFit()).restore(RunDirectory(path), {}) == []
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 5  # train at 3, 6 and 9; two types at the evaluation at 7
    (path / "metrics.jsonl").write_text("".join(lines[:3]))
    (note,) = trainer_of(LineFit()).restore(RunDirectory(path), {})
    assert "5 records were written up to step 9, and 3 are left" in note
    run(path, LineFit(12, interrupt), resume=True)
    assert trainer_of(LineFit()).restore(RunDirectory(path), {}) == []


@pytest.mark.parametrize(("after", "step", "epochs"), [("25%", 5, "20st"), ("20st", 20, "20st"), ("20st", 20, "30st")])
def test_a_run_stops_after_a_length_once_and_can_then_be_longer(whole, tmp_path, after, step, epochs):
    path = tmp_path / "run"
    assert run(path, LineFit(), run={"stop_after": after}) is None
    assert ended(path) == ("stopped", step, "stop after")
    more = {"optim": {"epochs": epochs}, "run": {"stop_after": after}}
    run(path, LineFit(), resume=True, changed={"optim.epochs": epochs}, **more)
    assert read_json(path / "summary.json")["steps"] == int(epochs[:2])
    assert epochs != "20st" or read_records(path) == read_records(whole)


def kept(path):
    return sorted(int(folder.name.removeprefix("step-")) for folder in (path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every": "4st", "keep": 3}, [12, 16, 20]),
        ({"every": "4st", "milestones": "6st"}, [6, 12, 18, 20]),
        ({"every": "10min"}, [20]),
        ({"every": "0.0001s", "keep": 30}, [*range(1, 21)]),
        ({"every": "100st", "milestones": "1ep"}, [5, 10, 15, 20]),
    ],
)
def test_checkpoints_are_kept_as_asked(tmp_path, settings, steps):
    run(tmp_path / "run", LineFit(), checkpoint=settings)
    assert kept(tmp_path / "run") == steps


def test_the_best_checkpoint_is_kept_and_can_be_resumed(tmp_path):
    class Worsening(LineFit):
        def evaluate(self, network):
            records, line = super().evaluate(network)
            records["eval"]["score"] *= -1  # so that the first evaluation stays the best
            return records, line

    path = tmp_path / "run"
    run(path, Worsening(), checkpoint={"best": True})
    assert kept(path) == [7, 20]
    assert (path / "checkpoints/best").read_text() == "step-00000007"
    assert read_json(path / "status.json")["best"]["step"] == 7
    assert (path / "checkpoints/step-00000007/state.json").is_file()


def test_an_average_is_what_is_measured_and_exported(tmp_path):
    path = tmp_path / "run"
    assert run(path, LineFit(), optim={"ema_decay": 0.9})["weights"] == "ema"
    twin = LineFit()
    average, trainer = dict.fromkeys(twin.module.state_dict(), 0.0), trainer_of(twin)
    for step, batch in zip(range(STEPS), twin.batches(0), strict=False):
        trainer.lr_scheduler.step_update(step)
        trainer.updater(batch, step + 1)
        decay = 0.9 if step else 0.0  # timm's first step copies
        for name, value in twin.module.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    exported = load_file(path / "model.safetensors")
    assert all(torch.allclose(exported[name], value, atol=1e-7) for name, value in average.items())
    assert not torch.equal(exported["weight"], twin.module.weight)
    assert read_records(path, "probe")[-1]["values"] == exported["weight"][0].tolist()


class Plain(LineFit):
    """The same without noise, and without looking at the number of the step."""

    def step(self, network, batch):
        loss = (network(batch.inputs) - batch.targets).square().mean()
        return loss, {"loss": loss.detach()}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_parts_of_a_batch_give_its_gradient(size):
    """Whatever the parts, also a short last one: against one pass over the whole batch, in float64."""
    gradients = []
    for micro in (None, size):
        task = Plain()
        task.module.double()
        trainer = trainer_of(task, data={"micro_batch": micro} if micro else {})
        batch = next(task.batches(3))
        batch = Points(batch.step, batch.inputs.double(), batch.targets.double())
        metrics = trainer.updater.backward(batch)
        gradients.append((metrics["loss"], *(weight.grad for weight in task.module.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: tensors that become numbers or move."""

    WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads = 0
        for name in ("tolist", "cpu", "numpy"):  # these never reach a dispatcher on a CPU
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(tensor, *arguments):
            self.reads += 1
            return method(tensor, *arguments)

        return call

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        self.reads += function.name() in self.WAITS
        return function(*arguments, **(more or {}))


@pytest.mark.parametrize(("opt", "reads"), [("adamw", 0), ("sgd", 0), ("lamb", 1)])
def test_nothing_waits_for_the_device_between_log_steps(monkeypatch, opt, reads):
    task = Plain()
    trainer = trainer_of(task, optim={"opt": opt, "clip_grad": 1.0, "ema_decay": 0.9}, data={"micro_batch": 3})
    assert len(trainer.notes) == reads
    batches = task.batches(0)
    trainer.state.metrics.add(*trainer.updater(next(batches), 1))  # the first update makes the optimizer's state
    with CountReads(monkeypatch) as counted:
        for step in range(1, 4):
            trainer.lr_scheduler.step_update(step)
            trainer.state.metrics.add(*trainer.updater(next(batches), step + 1))
    assert counted.reads >= 3 if reads else counted.reads == 0
    with CountReads(monkeypatch) as counted:
        trainer.state.metrics.read(SINGLE_PROCESS)
    assert counted.reads > 0


def test_a_trace_of_chosen_steps_is_written(tmp_path):
    run(tmp_path / "run", LineFit(), run={"profile": "3:5"})
    (file,) = (tmp_path / "run/profile").iterdir()
    assert file.name == "steps-3-5.json"
    names = [event["name"] for event in json.loads(file.read_text())["traceEvents"]]
    assert sum("Optimizer.step" in name for name in names) == 2
