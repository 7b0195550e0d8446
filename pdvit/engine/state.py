"""The training state: everything that a resumed run needs, as JSON and named tensors. Nothing is pickled."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pdvit.engine.distributed import Ranks
from pdvit.errors import RunFailed

VERSION = 3
# Keys of a parameter group that follow the configuration of the resumed run.
CONFIGURED = ("params", "lr", "initial_lr", "lr_scale", "weight_decay", "fused")
TENSOR, DTYPE = "__tensor__", "__dtype__"  # stand for values that JSON does not have


@dataclass
class Progress:
    """Steps, images, seconds by phase, skipped steps, the best evaluation, lines of metrics.jsonl."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    records: int = 0
    evaluation_owed: bool = False  # an evaluation after `step` was due, and the run was stopped in it

    def __post_init__(self) -> None:
        counts, times = (self.step, self.samples, self.skipped, self.records), self.seconds_by_phase.values()
        whole = all(type(count) is int and 0 <= count < 2**63 for count in counts)
        if not (whole and math.isfinite(sum(times, self.best or 0.0))):
            raise ValueError("its progress is not in whole numbers, or its times or best evaluation are not finite")

    @property
    def seconds(self) -> float:
        """Seconds of training: data and steps, without evaluation and saving."""
        return self.seconds_by_phase.get("data", 0.0) + self.seconds_by_phase.get("step", 0.0)


@dataclass
class MetricAccumulator:
    """Sums of metrics over steps, and counts of steps, kept on the device until they are read."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metrics: dict[str, Tensor], skipped: Tensor) -> None:
        """Add one step's scalars; those of a skipped step are left out of the means."""
        sums, count = self.sums, skipped.double()
        for name, value in metrics.items():
            sums[f"sum.{name}"] = sums.get(f"sum.{name}", 0) + torch.where(skipped, 0.0, value.detach().double())
        sums["steps"] = sums.get("steps", 0) + torch.ones_like(count)
        sums["skipped"] = sums.get("skipped", 0) + count
        sums["in_a_row"] = (sums.get("in_a_row", 0) + 1) * count

    def read(self, ranks: Ranks) -> tuple[dict[str, float], int, int]:
        """Return means, steps skipped since the last reading, and in a row. Training waits for the device only here."""
        total = ranks.all_reduce(torch.stack([*self.sums.values()])).div(ranks.world_size).tolist()
        sums = dict(zip(self.sums, total, strict=True))
        steps, skipped, in_a_row = (sums.pop(name) for name in ("steps", "skipped", "in_a_row"))
        counted = steps - skipped or float("nan")
        self.sums = {"in_a_row": self.sums["in_a_row"]}
        means = {name.removeprefix("sum."): total / counted for name, total in sums.items()}
        return means, round(skipped), round(in_a_row)


@dataclass(frozen=True)
class Snapshot:
    """A state in main memory: metadata for JSON, and tensors by file and name."""

    step: int
    metadata: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    anchor: dict[str, Tensor] = field(default_factory=dict)  # never changes, so it is no copy


@dataclass
class TrainState:
    """What a run changes, with its configuration and data."""

    module: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    ema: ModelEmaV3 | None
    device: torch.device
    ranks: Ranks
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)
    anchor: nn.Module | None = None  # frozen: see `protocol.Task`

    def state_dict(self, generators: Mapping[str, Tensor] | None = None) -> Snapshot:
        """Copy the state to main memory, on rank 0; with `generators` instead of their present states."""
        rest: dict[str, Tensor] = {}
        own = {f"metrics.{name}": value.cpu() for name, value in self.metrics.sums.items()}
        own |= {f"generator.{name}": value for name, value in (generators or self.generators()).items()}
        for rank, tensors in enumerate(self.ranks.all_gather(own)):
            rest |= {f"{rank}.{name}": value for name, value in tensors.items()}

        def encode(item: Any) -> dict[str, str]:
            """Return a reference for what JSON does not have; tensors move to `rest`."""
            if isinstance(item, Tensor):
                rest[f"optimizer.{len(rest)}"] = item
                return {TENSOR: f"optimizer.{len(rest) - 1}"}
            if isinstance(item, torch.dtype):
                return {DTYPE: str(item).removeprefix("torch.")}
            raise TypeError(f"the optimizer has a {type(item).__name__}, which a checkpoint can't hold")

        optimizer = get_optimizer_state_dict(self.module, self.optimizer)  # by the names of parameters
        metadata = {
            "version": VERSION,
            "config": self.config,
            "data": self.data,
            "progress": asdict(self.progress),
            "metric_names": list(self.metrics.sums),
            "scaler": self.scaler.state_dict(),
            "optimizer": json.loads(json.dumps(optimizer, default=encode)),
        }
        files = {"module": self.module.state_dict(), "state": rest}
        files |= {"ema": self.ema.module.state_dict()} if self.ema else {}
        copies: dict[str, dict[str, Tensor]] = {file: {} for file in files}
        for file, tensors in files.items():
            for name, tensor in tensors.items():  # one at a time: no other rank holds the whole model
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.ranks.main:
                    copies[file][name] = full.detach().to("cpu", copy=True).contiguous()
        anchor = self.anchor.state_dict() if self.anchor else {}
        return Snapshot(self.progress.step, metadata, copies, anchor)

    def load_state_dict(self, snapshot: Snapshot) -> None:
        """Restore a snapshot; only rank 0 needs its weights and optimizer. Any error means that it does not fit."""
        metadata, tensors = snapshot.metadata, snapshot.tensors
        several, main = self.ranks.world_size > 1, self.ranks.main
        options = StateDictOptions(full_state_dict=several, broadcast_from_rank0=several, strict=False)
        # Groups as this run configures them: their number changes with the layer decay.
        groups: Any = get_optimizer_state_dict(self.module, self.optimizer)["param_groups"]

        def decode(item: dict[str, Any]) -> Any:
            if TENSOR in item:
                return tensors["state"][item[TENSOR]]
            return getattr(torch, item[DTYPE]) if DTYPE in item else item

        saved = json.loads(json.dumps(metadata["optimizer"]), object_hook=decode) if main else {}
        if main and len(saved["param_groups"]) == len(groups):
            for group, old in zip(groups, saved["param_groups"], strict=True):
                group |= {key: value for key, value in old.items() if key not in CONFIGURED}
        optimizer = {"state": saved["state"], "param_groups": groups} if main else {}
        set_optimizer_state_dict(self.module, self.optimizer, optimizer, options=options)
        options.strict = True
        # After the optimizer: torch makes its state by a step without gradient.
        weights: Any = tensors["module"] if main else {}
        set_model_state_dict(self.module, dict(weights), options=options)
        if self.ema is not None:
            set_model_state_dict(self.ema.module, dict(tensors.get("ema", weights)), options=options)
        if self.anchor is not None:
            set_model_state_dict(self.anchor, dict(snapshot.anchor), options=options)
        if self.scaler.is_enabled() and metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        self.progress = Progress(**metadata["progress"])
        # On more processes than before, the new ones take the means of rank 0 and keep their own generators.
        rest, rank = tensors["state"], self.ranks.rank
        own = rank if f"{rank}.generator.cpu" in rest else 0
        sums = {name: rest[f"{own}.metrics.{name}"] for name in metadata["metric_names"]}
        self.metrics.sums = {name: value.to(self.device, torch.float64) for name, value in sums.items()}
        if own == rank:
            self.set_generators(rest, rank)

    def check_weights(self) -> None:
        """Raise RunFailed on all ranks if weights are not finite, so that they are neither evaluated nor saved."""
        weights = self.module.state_dict()  # with running statistics, which can break alone
        shards = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights.values()]
        broken = self.ranks.all_reduce(torch.stack([(~shard.isfinite()).any() for shard in shards]).int()).tolist()
        if names := [name for name, count in zip(weights, broken, strict=True) if count]:
            what = f"{', '.join(names[:3])} became infinite or not a number by step {self.progress.step}"
            raise RunFailed(what, "start a new run with a lower --lr, or with --clip-grad 1")

    def generators(self) -> dict[str, Tensor]:
        """Return the states of this process's generators, which drop path and dropout use."""
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **cuda}

    def set_generators(self, saved: Mapping[str, Tensor], rank: int) -> None:
        """Restore what `generators` returned on a rank, from the tensors of a snapshot."""
        torch.set_rng_state(saved[f"{rank}.generator.cpu"])
        if f"{rank}.generator.cuda" in saved and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved[f"{rank}.generator.cuda"], self.device)
