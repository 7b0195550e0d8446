import json
import shutil
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler

from pdvit.config.schema import OptimConfig
from pdvit.engine import checkpoint as checkpoints_module
from pdvit.engine.checkpoint import Checkpoints
from pdvit.engine.distributed import SINGLE_PROCESS
from pdvit.engine.state import MetricAccumulator, Progress, TrainState
from pdvit.engine.update import make_optimizer
from pdvit.errors import UserError

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


def fresh(opt="adamw", seed=0, module=Noisy):
    torch.manual_seed(seed)
    network = module()
    optimizer = make_optimizer(network, OptimConfig(opt=opt, lr=0.05))
    average = ModelEmaV3(network, decay=0.9)
    scaler, metrics = GradScaler("cpu", enabled=False), MetricAccumulator(CPU)
    return TrainState(network, optimizer, scaler, average, CPU, SINGLE_PROCESS, {"a": {"b": 1}}, {}, metrics)


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
        state.progress.seconds_by_phase["step"] = state.progress.seconds + 0.1
    return state


def save(state, folder, keep=1):
    checkpoints = Checkpoints(folder, keep)
    checkpoints.save(state.state_dict())
    checkpoints.wait()


def restore(state, folder):
    Checkpoints(folder, 1).load(state, lambda metadata: None)
    return state.progress.step > 0


def trained(folder, opt="adamw", steps=3, keep=1):
    state = train(fresh(opt), steps)
    save(state, folder, keep)
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
    assert not identical(ours, theirs)
    assert restore(theirs, tmp_path)
    assert identical(ours, theirs)
    assert theirs.progress == ours.progress
    assert theirs.metrics.steps == 3
    assert torch.equal(torch.get_rng_state(), generator)

    train(theirs, 3)
    torch.set_rng_state(generator)
    train(ours, 3)
    assert identical(ours, theirs)
    assert ours.metrics.read(SINGLE_PROCESS) == theirs.metrics.read(SINGLE_PROCESS)


def test_progress_is_restored_to_the_last_digit(tmp_path):
    ours = fresh()
    spent = {"step": 0.1 + 0.2, "data": 1 / 7}
    ours.progress = Progress(step=7, samples=56, skipped=2, seconds_by_phase=spent, best=1 / 3, best_step=5)
    save(ours, tmp_path)
    theirs = fresh()
    restore(theirs, tmp_path)
    assert theirs.progress == ours.progress


def test_nothing_to_restore_is_no_error(tmp_path):
    state = fresh()
    assert not restore(state, tmp_path / "checkpoints")
    assert state.progress == Progress()


def checkpoints(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_as_many_checkpoints_are_kept_as_asked(tmp_path, keep):
    state = fresh()
    for _ in range(4):
        save(train(state, 1), tmp_path, keep)
    assert checkpoints(tmp_path) == [f"step-{step:08d}" for step in range(1, 5)][-keep:]
    assert (tmp_path / "last").read_text().strip() == "step-00000004"


def test_nothing_is_pickled(tmp_path):
    trained(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ""}
    assert [path.name for path in files if not path.suffix] == ["last"]
    # A zip (torch.save) starts with PK, a pickle of protocol 2 and later with 0x80.
    assert not any(path.read_bytes().startswith((b"PK", b"\x80")) for path in files)


def fail_at(monkeypatch, call):
    """Let the n-th file that a save writes fail, as a full disk does."""
    count = iter(range(100))

    def failing(real):
        def write(*arguments, **more):
            if next(count) == call:
                raise OSError(28, "No space left on device")
            return real(*arguments, **more)

        return write

    for name in ("save_file", "write_file"):
        monkeypatch.setattr(checkpoints_module, name, failing(getattr(checkpoints_module, name)))


def fail_to_save(monkeypatch, state, folder, call):
    with monkeypatch.context() as patch:
        fail_at(patch, call)
        with pytest.raises(UserError, match=f"step {state.progress.step} can't be written: No space"):
            save(state, folder)


@pytest.mark.parametrize("call", range(5))
def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch, call):
    before = tensors_of(trained(tmp_path, steps=2))
    before = {name: value.clone() for name, value in before.items()}
    later = train(fresh(), 5)
    fail_to_save(monkeypatch, later, tmp_path, call)
    restored = fresh(seed=1)
    assert restore(restored, tmp_path)
    assert restored.progress.step == 2
    found = tensors_of(restored)
    assert all(torch.equal(found[name], before[name]) for name in before)
    save(later, tmp_path)
    assert restore(fresh(), tmp_path)
    assert checkpoints(tmp_path) == ["step-00000005"]


def test_the_pointer_is_written_last(tmp_path, monkeypatch):
    trained(tmp_path, steps=2)
    later = train(fresh(), 5)
    fail_to_save(monkeypatch, later, tmp_path, 4)
    assert (tmp_path / "last").read_text().strip() == "step-00000002"
    assert {path.name for path in (tmp_path / "step-00000005").iterdir()} == {
        "module.safetensors",
        "ema.safetensors",
        "state.safetensors",
        "state.json",
    }


def test_a_checkpoint_that_no_pointer_reached_does_not_push_out_the_newest(tmp_path, monkeypatch):
    # Killed between a checkpoint and its pointer, resumed from the one before, then stopped short of the lost step.
    trained(tmp_path, steps=5)
    lost = train(fresh(), 10)
    fail_to_save(monkeypatch, lost, tmp_path, 4)
    resumed = fresh()
    restore(resumed, tmp_path)
    save(train(resumed, 2), tmp_path)
    again = fresh()
    assert restore(again, tmp_path)
    assert again.progress.step == 7


def change(path, edit):
    """Change the facts in place; the checksums go, so that what is wrong has to be found without them."""
    facts = json.loads(path.read_text())
    facts.pop("checksums", None)
    edit(facts)
    path.write_text(json.dumps(facts))


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def rewrite(path, edit):
    """Save a safetensors file again after `edit` changed its tensors in place."""
    tensors = checkpoints_module.load_file(path)
    edit(tensors)
    checkpoints_module.save_file(tensors, path)
    change(path.with_name("state.json"), lambda facts: None)


DAMAGES = {
    "half the module": lambda source: halve(source / "module.safetensors"),
    "half the state": lambda source: halve(source / "state.safetensors"),
    "half the facts": lambda source: halve(source / "state.json"),
    "no module": lambda source: (source / "module.safetensors").unlink(),
    "no facts": lambda source: (source / "state.json").unlink(),
    "no folder": shutil.rmtree,
    "facts that are a list": lambda source: (source / "state.json").write_text("[]"),
    "facts that are noise": lambda source: (source / "state.json").write_bytes(b"\xff\xfe\x00"),
    "nested facts": lambda source: (source / "state.json").write_text("[" * 100_000),
    "no progress": lambda source: change(source / "state.json", lambda facts: facts.pop("progress")),
    "strange progress": lambda source: change(source / "state.json", lambda facts: facts["progress"].update(a=1)),
    "no meter": lambda source: change(source / "state.json", lambda facts: facts.pop("metric_names")),
    "no optimizer": lambda source: change(source / "state.json", lambda facts: facts.update(optimizer={})),
    "a listed optimizer": lambda source: change(source / "state.json", lambda f: f["optimizer"].update(state=[1])),
    "no groups": lambda source: change(source / "state.json", lambda f: f["optimizer"].pop("param_groups")),
    "no generator": lambda source: rewrite(source / "state.safetensors", lambda t: t.pop("0.generator.cpu")),
    "half a generator": lambda source: rewrite(
        source / "state.safetensors", lambda t: t.update({"0.generator.cpu": t["0.generator.cpu"][:9].clone()})
    ),
    "no weight": lambda source: rewrite(source / "module.safetensors", lambda t: t.pop("first.weight")),
    "a strange pointer": lambda source: (source.parent / "last").write_bytes(b"\xff\xfe"),
    "an empty pointer": lambda source: (source.parent / "last").write_bytes(b""),
    "a pointer to nothing": lambda source: (source.parent / "last").write_text("step-00000099"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    trained(tmp_path)
    damage(tmp_path / "step-00000003")
    with pytest.raises(UserError, match="damaged") as caught:
        restore(fresh(), tmp_path)
    assert str(tmp_path) in caught.value.where


@pytest.mark.parametrize("name", ["module", "ema", "state"])
def test_a_byte_that_changed_inside_a_tensor_is_noticed(tmp_path, name):
    trained(tmp_path)
    path = tmp_path / "step-00000003" / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # safetensors has the tensors at the end
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged: .*{name}\.safetensors is not what was written"):
        restore(fresh(), tmp_path)


def test_a_digit_that_changed_in_the_facts_is_noticed(tmp_path):
    trained(tmp_path)
    path = tmp_path / "step-00000003" / "state.json"
    path.write_text(path.read_text().replace('"samples": 24', '"samples": 25'))
    with pytest.raises(UserError, match=r"damaged: .*state\.json is not what was written"):
        restore(fresh(), tmp_path)


def test_an_average_that_is_gone_is_noticed(tmp_path):
    trained(tmp_path)
    (tmp_path / "step-00000003" / "ema.safetensors").unlink()
    with pytest.raises(UserError, match="damaged"):
        restore(fresh(), tmp_path)


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, difference):
    trained(tmp_path)
    change(tmp_path / "step-00000003" / "state.json", lambda facts: facts.update(version=facts["version"] + difference))
    with pytest.raises(UserError, match="has format"):
        restore(fresh(), tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError):
        restore(fresh(module=lambda: nn.Linear(2, 2)), tmp_path)


def test_saving_into_a_folder_that_is_a_file_says_so(tmp_path):
    place = Path(tmp_path / "checkpoints")
    place.touch()
    with pytest.raises(UserError, match="can't be written"):
        save(fresh(), place)
