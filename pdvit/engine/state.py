"""Everything that has to be the same for a run to go on as if nothing had happened, in one place."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from pdvit.engine.distributed import Ranks
from pdvit.engine.packing import pack, unpack
from pdvit.engine.update import Meter

VERSION = 2
# What a parameter group holds because the configuration says so; a resumed run follows its configuration.
CONFIGURED = ("params", "lr", "initial_lr", "lr_scale", "weight_decay", "fused")


@dataclass
class Progress:
    """How far a run has come: steps, images, seconds by phase, skipped steps, the best evaluation, lines of records."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    records: int = 0

    @property
    def seconds(self) -> float:
        """Seconds of training: waiting for data and computing, without evaluating and saving."""
        return self.spent.get("data", 0.0) + self.spent.get("step", 0.0)

    def summary(self) -> dict[str, Any]:
        """Return the closing numbers of the run itself."""
        return {
            "steps": self.step,
            "steps_skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.samples / max(self.seconds, 1e-9), 1),
            "seconds_by_phase": {phase: round(seconds, 3) for phase, seconds in self.spent.items()},
        }


@dataclass(frozen=True)
class Snapshot:
    """A state at rest: plain values for JSON, and tensors in main memory by file and name."""

    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def step(self) -> int:
        """The step after which it was taken."""
        return int(self.facts["progress"]["step"])


@dataclass
class State:
    """What changes while a run goes on, and what it must be resumed with."""

    module: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    ema: ModelEmaV3 | None
    meter: Meter
    device: torch.device
    ranks: Ranks
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)

    def snapshot(self) -> Snapshot:
        """Copy everything to main memory; every process takes part, and only the main one gets the tensors."""
        rest: dict[str, Tensor] = {}
        mine = {f"meter.{name}": value.cpu() for name, value in self.meter.tensors().items()}
        mine |= {f"generator.{name}": value for name, value in self.generators().items()}
        for rank, theirs in enumerate(self.ranks.all_gather(mine)):
            rest |= {f"{rank}.{name}": value for name, value in theirs.items()}
        facts = {
            "version": VERSION,
            "packages": {name: version(name) for name in ("torch", "timm")},
            "config": self.config,
            "data": self.data,
            "progress": asdict(self.progress),
            "meter_steps": self.meter.steps,
            "meter_names": list(self.meter.sums),
            "scaler": self.scaler.state_dict(),
            "optimizer": pack(self._optimizer_by_name(), "optimizer", rest),
        }
        tensors = {"module": self.module.state_dict(), "state": rest}
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        copies = {file: {name: self._copy(v) for name, v in content.items()} for file, content in tensors.items()}
        return Snapshot(facts, copies if self.ranks.main else {})

    def take(self, snapshot: Snapshot) -> None:
        """Take on what a snapshot holds; raises what torch and Python raise where it does not fit."""
        facts, tensors = snapshot.facts, snapshot.tensors
        rest = tensors["state"]
        _load(self.module, tensors["module"])
        if self.ema is not None:
            _load(self.ema.module, tensors.get("ema", tensors["module"]))
        self._take_optimizer(unpack(facts["optimizer"], rest))
        if self.scaler.is_enabled() and facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.progress = Progress(**facts["progress"])
        counts = (
            self.progress.step,
            self.progress.samples,
            self.progress.skipped,
            self.progress.records,
            facts["meter_steps"],
        )
        if not all(isinstance(count, int) for count in counts):
            raise TypeError("its counts are not whole numbers")
        rank = self.ranks.rank
        # Where there were fewer processes, this one takes the first one's means, and keeps the generators it has.
        theirs = rank if f"{rank}.generator.cpu" in rest else 0
        order = [*facts["meter_names"], "skipped", "in_a_row"]
        sums = {name: rest[f"{theirs}.meter.{name}"].to(self.device) for name in order}
        self.meter.take(sums, facts["meter_steps"])
        if theirs == rank:
            names = [name for name in rest if name.startswith(f"{rank}.generator.")]
            self.set_generators({name.split(".", 2)[2]: rest[name] for name in names} or {"cpu": rest["no generator"]})

    def generators(self) -> dict[str, Tensor]:
        """Return this process's generator states: what drop path and dropout draw from."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_generators(self, states: Mapping[str, Tensor]) -> None:
        """Undo `generators`."""
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def _copy(self, value: Tensor) -> Tensor:
        """Return a copy in main memory that safetensors takes: whole, contiguous, sharing nothing."""
        value = value.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if not self.ranks.main:
            return value  # nobody keeps it
        return value.clone().contiguous() if value.device.type == "cpu" else value.cpu().contiguous()

    def _names(self) -> list[str]:
        """Return the parameters' names in the optimizer's order."""
        names = {id(weight): name for name, weight in self.module.named_parameters()}
        return [names[id(weight)] for group in self.optimizer.param_groups for weight in group["params"]]

    def _optimizer_by_name(self) -> dict[str, Any]:
        """Return the optimizer's state with the names of parameters for their numbers."""
        state, names = self.optimizer.state_dict(), self._names()
        groups = [{key: v for key, v in group.items() if key not in CONFIGURED} for group in state["param_groups"]]
        return {"state": {names[index]: value for index, value in state["state"].items()}, "groups": groups}

    def _take_optimizer(self, saved: dict[str, Any]) -> None:
        current = self.optimizer.state_dict()
        weights = dict(self.module.named_parameters())
        if len(saved["groups"]) == len(current["param_groups"]):  # they differ after a change of layer decay
            for group, old in zip(current["param_groups"], saved["groups"], strict=True):
                group |= {key: value for key, value in old.items() if key not in CONFIGURED}
        index = {name: number for number, name in enumerate(self._names())}
        state = {
            index[name]: {key: _spread(value, weights[name]) for key, value in values.items()}
            for name, values in saved["state"].items()
        }
        self.optimizer.load_state_dict(current | {"state": state})


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    current = module.state_dict()
    module.load_state_dict({name: _spread(value, current.get(name)) for name, value in weights.items()})


def _spread(value: Any, weight: Tensor | None) -> Any:
    """Spread a whole tensor over the processes as its weight is, where that is spread."""
    if not (isinstance(value, Tensor) and isinstance(weight, Tensor) and hasattr(weight, "placements")):
        return value
    from torch.distributed.tensor import distribute_tensor

    spread: Any = weight
    return distribute_tensor(value, spread.device_mesh, spread.placements) if value.shape == weight.shape else value
