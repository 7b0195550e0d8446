"""Everything a checkpoint holds, in one place: tensors as safetensors, the rest as JSON, nothing pickled."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pdvit.engine.update import Meter
from pdvit.errors import UserError
from pdvit.tracking import sync, to_json, write_file

VERSION = 1
POINTER = "last"
# Marks what stands for something that JSON does not have.
TENSOR, DTYPE = "__tensor__", "__dtype__"


@dataclass
class Progress:
    """How far a run has come: steps, images and seconds of training, and the best evaluation so far."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None


@dataclass
class State:
    """What has to be the same for a run to go on as if nothing had happened."""

    module: nn.Module
    optimizer: Optimizer
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint and point `last` to it; then remove all but the newest `keep`. Raises OSError."""
        folder.mkdir(exist_ok=True)
        target = folder / f"step-{self.progress.step:08d}"
        beside = folder / f".{target.name}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        tensors = self._generators() | {f"meter.{name}": value for name, value in self.meter.sums.items()}
        facts = {
            "version": VERSION,
            "progress": asdict(self.progress),
            "meter_steps": self.meter.steps,
            "optimizer": _pack(self.optimizer.state_dict(), "optimizer", tensors),
        }
        save_file(_stored(self.module.state_dict()), beside / "module.safetensors")
        save_file(_stored(tensors), beside / "state.safetensors")
        write_file(beside / "state.json", to_json(facts))
        for written in (*beside.glob("*.safetensors"), beside):
            sync(written)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        write_file(folder / POINTER, target.name)
        names = sorted(path.name for path in folder.glob("step-*"))
        upto = [name for name in names if name <= target.name]
        for name in upto[:-keep] + names[len(upto) :]:  # a later one is left from before the run was taken up again
            shutil.rmtree(folder / name)

    def restore(self, folder: Path) -> bool:
        """Load the checkpoint that `last` points to; False where there is none yet.

        Raises UserError where it is damaged or was written by a newer pdvit.
        """
        if not (folder / POINTER).is_file():
            return False
        source = folder
        try:
            source = folder / (folder / POINTER).read_text().strip()
            facts = json.loads((source / "state.json").read_text())
            if facts["version"] > VERSION:
                raise UserError("the checkpoint is of a newer pdvit", str(source), "update pdvit")
            self._take(facts, load_file(source / "module.safetensors"), load_file(source / "state.safetensors"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint is damaged: {type(error).__name__}: {error}",
                str(source),
                f"start again: pdvit train --config {folder.parent / 'run.toml'}",
            ) from error
        return True

    def _take(self, facts: dict[str, Any], weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        """Take on what a checkpoint holds."""
        self.module.load_state_dict(weights)
        packed = facts["optimizer"]
        packed["state"] = {int(index): value for index, value in packed["state"].items()}
        self.optimizer.load_state_dict(_unpack(packed, tensors))
        self.progress = Progress(**facts["progress"])
        if not all(isinstance(n, int) for n in (self.progress.step, self.progress.samples, facts["meter_steps"])):
            raise TypeError("its counts are not whole numbers")
        sums = {name.removeprefix("meter."): value for name, value in tensors.items() if name.startswith("meter.")}
        self.meter.sums = {name: value.to(self.device) for name, value in sums.items()}
        self.meter.steps = facts["meter_steps"]
        torch.set_rng_state(tensors["generator.cpu"])
        if self.device.type == "cuda" and "generator.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["generator.cuda"], self.device)

    def _generators(self) -> dict[str, Tensor]:
        states = {"generator.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        return states


def _stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies that safetensors takes: contiguous, none sharing memory."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` for JSON, with every tensor in it moved to `tensors` under its path. Raises TypeError."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, dict):
        return {str(key): _pack(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    if isinstance(value, torch.dtype):
        return {DTYPE: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint can't hold")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `_pack` (tuples come back as lists)."""
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if DTYPE in value:
        return getattr(torch, value[DTYPE])
    return {key: _unpack(item, tensors) for key, item in value.items()}
