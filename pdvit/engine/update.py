"""The optimizer, the step in one or several processes, and one update of the weights."""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from pdvit.config.schema import Config, OptimConfig, RunConfig
from pdvit.engine.device import autocast
from pdvit.engine.distributed import Ranks
from pdvit.engine.protocol import Task, TrainBatch
from pdvit.engine.state import TrainState
from pdvit.errors import UserError, closest

# Optimizers of torch that update all weights in one kernel, and skip the update if a flag on the device is set.
FUSED = ("adamw", "adam", "sgd")
FUSED_FSDP = ("adamw", "adam")  # torch has no such kernel of SGD for sharded weights


def make_optimizer(module: nn.Module, optim: OptimConfig) -> Optimizer:
    """Build a timm optimizer; norms, biases, position and prefix tokens have no weight decay, as in timm's models."""
    name, where = optim.opt.lower(), "optim.opt (--opt)"
    sharded = any(hasattr(weight, "placements") for weight in module.parameters())
    fused: dict[str, Any] = {"fused": True} if name in (FUSED_FSDP if sharded else FUSED) else {}
    try:
        optimizer = create_optimizer_v2(
            module, opt=optim.opt, lr=optim.lr, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay, **fused
        )
    except Exception as error:  # each optimizer reports missing requirements in its own way
        if name not in list_optimizers():
            tip = closest(name, map(str, list_optimizers()))
            raise UserError(f"timm has no optimizer named '{optim.opt}'", where, tip) from error
        what = f"{name} can't run here: {str(error) or type(error).__name__}"
        raise UserError(what, where, "for example adamw") from error
    assert isinstance(optimizer, Optimizer)
    for group in optimizer.param_groups:  # without weight decay timm includes frozen parameters
        group["params"] = [weight for weight in group["params"] if weight.requires_grad]
    if optim.head_lr is not None:
        heads, scale = module.head_weights(), optim.head_lr / (optim.lr or optim.head_lr)  # type: ignore[operator]
        for group in list(optimizer.param_groups):  # timm's schedules multiply the rate of a group by its lr_scale
            own = [weight for weight in group["params"] if weight in heads]
            group["params"] = [weight for weight in group["params"] if weight not in heads]
            optimizer.param_groups.append({**group, "params": own, "lr_scale": scale})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"{name} needs second derivatives", where, "for example adamw")
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"]:
        # If the first update is skipped, torch's fused kernel leaves the first buffer uninitialized.
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


class Step(nn.Module):
    """A task's step as a module that DDP can wrap, so that its collectives stay outside of a compiled graph."""

    def __init__(self, task: Task, compiled: bool) -> None:
        super().__init__()
        self.module = task.module
        # Static shapes: every part of every batch but a short last one is of one size.
        self.step = torch.compile(task.step, dynamic=False, fullgraph=True) if compiled else task.step

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of a part of a batch."""
        return self.step(self.module, batch)


def parallelize(task: Task, ema: ModelEmaV3 | None, run: RunConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """Return the step: as it is, under DDP, or with module and average sharded in place by FSDP2, block by block.

    Raises UserError.
    """
    if run.distribute == "fsdp":
        if ranks.world_size == 1:
            tip = "add --launcher local --gpus N, or start with torchrun"
            raise UserError("fsdp needs several processes", "run.distribute (--distribute)", tip)
        if run.compile:
            what = "a model that fsdp shards can't be compiled: its weights are fetched within the step"
            raise UserError(what, "run.compile (--compile)", "leave it out, or use --distribute ddp")
        from torch.distributed.fsdp import fully_shard

        # The tokens are views of the last layer's output; nothing changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        modules: list[Any] = [task.module, *([ema.module] if ema else [])]
        for part in chain.from_iterable([*module.blocks(), module] for module in modules):
            fully_shard(part, reshard_after_forward=True)  # else an evaluation leaves the outer weights whole
    step = Step(task, run.compile)
    if ranks.world_size == 1 or run.distribute == "fsdp":
        return step
    return nn.parallel.DistributedDataParallel(step, device_ids=[device.index] if device.type == "cuda" else None)


@dataclass
class Updater:
    """One update: forward and backward in parts, clip, optimizer step if loss and gradient are finite, average."""

    task: Task
    network: nn.Module  # the task's step, as `parallelize` returns it
    state: TrainState
    config: Config

    def __call__(self, batch: TrainBatch, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Update the weights for step `step`; return the batch's metrics and whether it was skipped, on the device."""
        optimizer: Any = self.state.optimizer
        metrics = self.backward(batch)
        self.state.scaler.unscale_(optimizer)
        metrics["grad_norm"] = norm = self.clip()
        skipped = ~(norm.isfinite() & metrics["loss"].isfinite())
        skipped = self.state.ranks.all_reduce(skipped.int()) > 0  # all ranks must do the same
        if optimizer.defaults.get("fused"):  # skips on the device, in the way of torch's gradient scaler
            optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not bool(skipped):
            optimizer.step()
        self.state.scaler.update()
        if self.state.ema is not None:
            self.state.ema.update(self.task.module, step)
        return metrics, skipped

    def backward(self, batch: TrainBatch, micro_batch: int | None = None) -> dict[str, Tensor]:
        """Leave the batch's gradient in the weights, part by part, and return its metrics, means over its images."""
        self.network.train()
        self.state.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Tensor] = {}
        parts = batch.split(micro_batch or self.config.data.micro_batch or len(batch))
        no_sync: Any = getattr(self.network, "no_sync", nullcontext)  # DDP
        fsdp_sync: Any = getattr(self.task.module, "set_requires_gradient_sync", None)
        # cuDNN tries its kernels for each shape: training has few, evaluation can have one for each image.
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, not self.config.run.deterministic
        try:
            for number, part in enumerate(parts, 1):
                weight, last = len(part) / len(batch), number == len(parts)  # a short last part counts less
                if fsdp_sync:
                    fsdp_sync(last)
                with nullcontext() if last else no_sync():  # ranks add up their gradients only once, with the last part
                    with autocast(self.state.device, self.config.run.precision):
                        loss, found = self.network(part)
                    self.state.scaler.scale(loss * weight).backward()
                for name, value in found.items():
                    metrics[name] = metrics[name] + weight * value if name in metrics else weight * value
        finally:
            torch.backends.cudnn.benchmark = before
        return metrics

    def clip(self) -> Tensor:
        """Clip the gradient to the maximum norm, if there is one; return the norm before."""
        weights = [weight for weight in self.network.parameters() if weight.grad is not None]
        norm: Any = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if self.config.optim.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(weights, self.config.optim.clip_grad, norm)
        full: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return full.detach()
