"""The step as training calls it: compiled or not, in one process, under DDP or FSDP."""

import warnings
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from pdvit.config.schema import RunConfig
from pdvit.engine.distributed import Ranks
from pdvit.engine.protocol import StepOutput, Task
from pdvit.errors import UserError


class Step(nn.Module):
    """A task's step as a module that DDP can wrap, so that its collectives stay outside of a compiled graph."""

    def __init__(self, task: Task, compiled: bool) -> None:
        super().__init__()
        self.module = task.module
        # Static shapes: every part of every batch but a short last one is of one size.
        self.step = torch.compile(task.step, dynamic=False, fullgraph=True) if compiled else task.step

    def forward(self, batch: Any) -> StepOutput:
        """Run forward pass and objective on a part of a batch."""
        return self.step(self.module, batch)


def parallelize(task: Task, ema: ModelEmaV3 | None, run: RunConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """Return the step to call: as it is, under DDP, or with module and average sharded (in place) by FSDP2.

    FSDP shards each block by itself: every child of an nn.ModuleList or nn.Sequential of several. Raises UserError if
    processes or torch can't do it.
    """
    if run.distribute == "fsdp":
        if ranks.world_size == 1:
            raise UserError("fsdp needs several processes", "run.distribute (--distribute)", "start with torchrun")
        if run.compile:
            what = "a model that fsdp shards can't be compiled: its weights are fetched within the step"
            raise UserError(what, "run.compile (--compile)", "leave it out, or use --distribute ddp")
        for part in (task.module, *([ema.module] if ema else [])):
            _shard(part)
    step = Step(task, run.compile)
    if ranks.world_size == 1 or run.distribute == "fsdp":
        return step
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(step, device_ids=[device.index] if device.type == "cuda" else None)


def _shard(module: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    # The tokens are views of the last layer's output; nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for part in reversed(list(module.modules())):  # from the inside: blocks before the stages that hold them
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1:
            for block in part:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(module, reshard_after_forward=True)  # else an evaluation leaves the outer weights whole
