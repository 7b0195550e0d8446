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
from pdvit.tracking import to_json, write_file

VERSION = 1
POINTER = "last"


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
        optimizer_tensors, optimizer_rest = _flatten(self.optimizer.state_dict())
        tensors = optimizer_tensors | self._generators()
        tensors |= {f"meter.{name}": value for name, value in self.meter.sums.items()}
        save_file(_stored(self.module.state_dict()), beside / "module.safetensors")
        save_file(_stored(tensors), beside / "state.safetensors")
        facts = {
            "version": VERSION,
            "progress": asdict(self.progress),
            "meter_steps": self.meter.steps,
            "optimizer": optimizer_rest,
        }
        write_file(beside / "state.json", to_json(facts))
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        write_file(folder / POINTER, target.name)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    def restore(self, folder: Path) -> bool:
        """Load the checkpoint that `last` points to; False where there is none yet.

        Raises UserError where it is damaged or was written by a newer pdvit.
        """
        if not (folder / POINTER).is_file():
            return False
        source = folder / (folder / POINTER).read_text().strip()
        try:
            facts = json.loads((source / "state.json").read_text())
            if facts["version"] > VERSION:
                raise UserError("the checkpoint is of a newer pdvit", str(source), "update pdvit")
            self.module.load_state_dict(load_file(source / "module.safetensors"))
            tensors = load_file(source / "state.safetensors")
            self.optimizer.load_state_dict(_unflatten(tensors, facts["optimizer"]))
            self.progress = Progress(**facts["progress"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint is damaged: {error}",
                str(source),
                "start again: pdvit train --config RUN/run.toml",
            ) from error
        sums = {n.removeprefix("meter."): t for n, t in tensors.items() if n.startswith("meter.")}
        self.meter.sums = {name: value.to(self.device) for name, value in sums.items()}
        self.meter.steps = facts["meter_steps"]
        torch.set_rng_state(tensors["generator.cpu"])
        if self.device.type == "cuda" and "generator.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["generator.cuda"], self.device)
        return True

    def _generators(self) -> dict[str, Tensor]:
        states = {"generator.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        return states


def _stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies that safetensors takes: contiguous, none sharing memory."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name and what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                rest.setdefault(str(index), {})[name] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def _unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Undo `_flatten`."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for name, value in tensors.items():
        kind, _, tail = name.partition(".")
        if kind == "optimizer":
            index, _, entry = tail.partition(".")
            state.setdefault(int(index), {})[entry] = value
    return {"state": state, "param_groups": rest["param_groups"]}
