"""The network as it is called in training: alone, or spread over processes; and its moving average."""

import warnings
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pdvit.engine.ranks import Ranks
from pdvit.errors import UserError


def make_average(module: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """Return timm's moving average of the weights, or None without a decay."""
    return None if decay is None else ModelEmaV3(module, decay=decay)


def spread(module: nn.Module, average: ModelEmaV3 | None, how: str, ranks: Ranks, device: torch.device) -> nn.Module:
    """Return the module to call: itself, under DDP, or (in place, with its average) under FSDP2.

    FSDP takes each block of the module by itself: every child of an nn.ModuleList or nn.Sequential of several.
    """
    if how == "fsdp":
        if ranks.size == 1:
            raise UserError("fsdp needs several processes", "run.distribute (--distribute)", "start with torchrun")
        for part in (module, *([average.module] if average else [])):
            _shard(part)
        return module
    if ranks.size == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which is all of it where it is not spread."""
    part: Any = tensor
    return part.to_local() if hasattr(part, "to_local") else tensor


def _shard(module: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    # The tokens are views of the last layer's output; nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for part in list(module.modules()):
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1:
            for block in part:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(module, reshard_after_forward=True)  # else an evaluation leaves the outer weights whole
