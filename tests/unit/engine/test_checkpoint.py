import json
import os
import zlib
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler

from pdvit.config.schema import OptimConfig
from pdvit.engine import checkpoint as checkpoints_module
from pdvit.engine.checkpoint import Checkpoints
from pdvit.engine.distributed import SINGLE_PROCESS
from pdvit.engine.state import TrainState
from pdvit.engine.update import make_optimizer
from pdvit.tracking.run_directory import to_json
from tests.errors import refused

CPU = torch.device("cpu")


class Noisy(nn.Module):
    """A small network with a buffer, tied weights and noise from the process generator."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.second(self.dropout(self.norm(self.first(images))))


def fresh(opt="adamw", seed=0, module=Noisy, anchor=None):
    torch.manual_seed(seed)
    network = module()
    optimizer = make_optimizer(network, OptimConfig(opt=opt, lr=0.05))
    average = ModelEmaV3(network, decay=0.9)
    scaler = GradScaler("cpu", enabled=False)
    return TrainState(network, optimizer, scaler, average, CPU, SINGLE_PROCESS, {"a": {"b": 1}}, {}, anchor=anchor)


def train(state, steps):
    for _ in range(steps):
        state.optimizer.zero_grad()
        loss = state.module(torch.randn(8, 4)).square().mean()
        loss.backward()
        state.optimizer.step()
        state.ema.update(state.module, state.progress.step + 1)
        state.metrics.add({"loss": loss}, torch.tensor(False))
        state.progress.step += 1
        state.progress.samples += 8
        state.progress.seconds_by_phase["step"] = state.progress.seconds + 1 / 7
    return state


def save(state, folder):
    Checkpoints(folder).write(state.state_dict())


def restore(state, folder):
    Checkpoints(folder).load(state, lambda metadata: None)
    return state.progress.step > 0


def trained(folder, opt="adamw", steps=3):
    state = train(fresh(opt), steps)
    save(state, folder)
    return state


def tensors_of(state):
    found = dict(state.module.state_dict()) | {f"ema.{k}": v for k, v in state.ema.module.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return found | {f"meter.{name}": value for name, value in state.metrics.sums.items()}


def identical(ours, theirs):
    a, b = tensors_of(ours), tensors_of(theirs)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "momentum", "lamb", "lion", "adafactor", "muon", "adafactorbv"])
def test_a_restored_state_goes_on_as_if_nothing_had_happened(tmp_path, opt):
    ours = trained(tmp_path, opt)
    generator = torch.get_rng_state()
    theirs = fresh(opt, seed=1)
    assert not restore(theirs, tmp_path / "none")
    assert not identical(ours, theirs)
    assert restore(theirs, tmp_path)
    assert identical(ours, theirs)
    assert theirs.progress == ours.progress
    assert theirs.metrics.sums["steps"] == 3
    assert torch.equal(torch.get_rng_state(), generator)

    train(theirs, 3)
    torch.set_rng_state(generator)
    train(ours, 3)
    assert identical(ours, theirs)
    assert ours.metrics.read(SINGLE_PROCESS) == theirs.metrics.read(SINGLE_PROCESS)


def test_an_anchor_is_written_once_and_all_checkpoints_need_it(tmp_path):
    """One of a run that was killed before its first checkpoint is replaced."""
    ours, theirs, file = fresh(anchor=Noisy()), fresh(seed=1, anchor=Noisy()), tmp_path / "anchor.safetensors"
    file.write_bytes(b"of another attempt")
    save(train(ours, 1), tmp_path)
    written = file.stat()
    save(train(ours, 1), tmp_path)
    assert file.stat() == written
    assert not torch.equal(theirs.anchor.first.weight, ours.anchor.first.weight)
    assert restore(theirs, tmp_path)
    found, expected = (state.anchor.state_dict() for state in (theirs, ours))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for damage in (flip, Path.unlink):
        damage(file)
        with refused("anchor.safetensors is missing or damaged"):
            restore(theirs, tmp_path)


@pytest.fixture
def fail_to_save(tmp_path, monkeypatch):
    """Return a function that saves while the n-th file can't be written, as on a full disk."""

    def attempt(state, call):
        calls = iter(range(100))

        def failing(write, *arguments):
            if next(calls) == call:
                raise OSError(28, "No space left on device")
            return write(*arguments)

        with monkeypatch.context() as patch:
            for name in ("save_file", "write_file"):
                patch.setattr(checkpoints_module, name, partial(failing, getattr(checkpoints_module, name)))
            with refused(f"step {state.progress.step} can't be written: No space"):
                save(state, tmp_path)

    return attempt


@pytest.mark.parametrize("call", range(5))
def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path, fail_to_save, call):
    before = {name: value.clone() for name, value in tensors_of(trained(tmp_path, steps=2)).items()}
    later = train(fresh(), 5)
    fail_to_save(later, call)
    restored = fresh(seed=1)
    assert restore(restored, tmp_path)
    assert restored.progress.step == 2
    found = tensors_of(restored)
    assert all(torch.equal(found[name], before[name]) for name in before)
    save(later, tmp_path)
    assert restore(fresh(), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000005"]


def test_a_checkpoint_that_no_pointer_reached_does_not_remove_the_newest(tmp_path, fail_to_save):
    # Killed between a checkpoint and its pointer, resumed from the one before, then stopped short of the lost step.
    trained(tmp_path, steps=5)
    fail_to_save(train(fresh(), 10), 4)
    assert (tmp_path / "last").read_text() == "step-00000005"
    files = {"module.safetensors", "ema.safetensors", "state.safetensors", "state.json"}
    assert {path.name for path in (tmp_path / "step-00000010").iterdir()} == files
    resumed, again = fresh(), fresh()
    restore(resumed, tmp_path)
    save(train(resumed, 2), tmp_path)
    assert restore(again, tmp_path)
    assert again.progress.step == 7


def change(source, edit):
    """Change the metadata, and their checksum with them, so that the error has to be found without it."""
    file = source / "state.json"
    metadata = json.loads(file.read_text())
    sums = metadata.pop("checksums")
    edit(metadata)
    sums["state.json"] = zlib.crc32(to_json(metadata).encode())
    file.write_text(json.dumps(metadata | {"checksums": sums}))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # safetensors has the tensors at the end
    path.write_bytes(content)


DAMAGES = {
    "half the module": lambda source: os.truncate(source / "module.safetensors", 400),
    "a bit of the state": lambda source: flip(source / "state.safetensors"),
    "a digit": lambda source: (source / "state.json").write_text(
        (source / "state.json").read_text().replace('"samples": 24', '"samples": 25')
    ),
    "no average": lambda source: (source / "ema.safetensors").unlink(),
    "no metadata": lambda source: (source / "state.json").unlink(),
    "metadata that are a list": lambda source: (source / "state.json").write_text("[]"),
    "strange progress": lambda source: change(source, lambda metadata: metadata["progress"].update(a=1)),
    "a strange pointer": lambda source: (source.parent / "last").write_bytes(b"\xff\xfe"),
    "a pointer to nothing": lambda source: (source.parent / "last").write_text("step-00000099"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    trained(tmp_path)
    damage(tmp_path / "step-00000003")
    with refused("damaged", where=str(tmp_path)):
        restore(fresh(), tmp_path)


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_checkpoint_of_another_model_or_format_is_refused(tmp_path, difference):
    trained(tmp_path)
    with refused("damaged"):
        restore(fresh(module=lambda: nn.Linear(2, 2)), tmp_path)
    change(tmp_path / "step-00000003", lambda metadata: metadata.update(version=metadata["version"] + difference))
    with refused("has format"):
        restore(fresh(), tmp_path)


@pytest.mark.parametrize("change", ["layer decay", "frozen"])
def test_the_optimizer_is_restored_by_name(tmp_path, change):
    """Other parameter groups after a change of the layer decay; fewer parameters than the model has."""

    def make(layer_decay):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=2)
        if change == "frozen":
            model.blocks.requires_grad_(False)
        optimizer = make_optimizer(model, OptimConfig(opt="lamb", lr=0.05, layer_decay=layer_decay))
        scaler = GradScaler("cpu", enabled=False)
        return TrainState(model, optimizer, scaler, None, CPU, SINGLE_PROCESS, {}, {})

    ours, theirs = make(None), make(0.5 if change == "layer decay" else None)
    ours.module(torch.ones(1, 3, 160, 160)).square().mean().backward()
    ours.optimizer.step()
    ours.progress.step = 1
    save(ours, tmp_path)
    rates = [group["lr"] for group in theirs.optimizer.param_groups]
    assert restore(theirs, tmp_path)
    assert [group["lr"] for group in theirs.optimizer.param_groups] == rates
    weights = dict(theirs.module.named_parameters())
    for name, weight in ours.module.named_parameters():
        assert torch.equal(weight, weights[name])
        assert (weight in ours.optimizer.state) == weight.requires_grad
        for key, value in ours.optimizer.state.get(weight, {}).items():
            assert torch.equal(torch.as_tensor(theirs.optimizer.state[weights[name]][key]), torch.as_tensor(value))
