"""The optimizer, and one update of the weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from pdvit.config.schema import Config, OptimConfig
from pdvit.engine.device import autocast
from pdvit.engine.distributed import Ranks
from pdvit.engine.protocol import Batch, Task
from pdvit.errors import UserError, closest

# Of timm's names, those of torch that update all weights in one kernel, and leave them alone where a flag on the device
# says so.
FUSED = ("adamw", "adam", "sgd")
FUSED_SPREAD = ("adamw", "adam")  # with weights spread over processes (FSDP), torch has no such kernel of SGD


def make_optimizer(module: nn.Module, optim: OptimConfig) -> Optimizer:
    """Build a timm optimizer; norms, biases, position and prefix tokens are not decayed, as timm's models say.

    Raises UserError for a name that timm does not have, or an optimizer that can't run here.
    """
    name = optim.opt.lower()
    spread = any(hasattr(weight, "placements") for weight in module.parameters())
    more: dict[str, Any] = {"fused": True} if name in (FUSED_SPREAD if spread else FUSED) else {}
    try:
        optimizer = create_optimizer_v2(
            module, opt=optim.opt, lr=optim.lr, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay, **more
        )
    except Exception as error:  # each optimizer has its own way to miss what it needs
        if name not in list_optimizers():
            tip = closest(name, map(str, list_optimizers()))
            raise UserError(f"timm has no optimizer named '{optim.opt}'", "optim.opt (--opt)", tip) from error
        reason = str(error) or type(error).__name__
        raise UserError(f"{name} can't run here: {reason}", "optim.opt (--opt)", "for example adamw") from error
    assert isinstance(optimizer, Optimizer)
    for group in optimizer.param_groups:  # without weight decay timm hands on the frozen ones too
        group["params"] = [weight for weight in group["params"] if weight.requires_grad]
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"{name} needs second derivatives", "optim.opt (--opt)", "for example adamw")
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"]:
        # torch's fused kernel leaves the first buffer as it found it in memory where it skips the first update
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def skips_on_device(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer can leave out an update without anybody waiting for the device."""
    return bool(optimizer.defaults.get("fused"))


class Updater:
    """One update: every part of the batch there and back, clip, step where all is finite, moving average."""

    def __init__(
        self,
        task: Task,
        network: nn.Module,
        optimizer: Optimizer,
        scaler: GradScaler,
        ema: ModelEmaV3 | None,
        config: Config,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.task, self.network, self.optimizer, self.scaler, self.ema = task, network, optimizer, scaler, ema
        self.ranks, self.device, self.precision = ranks, device, config.run.precision
        self.micro_batch = config.data.micro_batch or task.batch_size
        self.largest = config.optim.clip_grad

    def __call__(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Update the weights for step `step`; return the batch's metrics and whether it was skipped, on the device."""
        metrics = self.backward(batch)
        self.scaler.unscale_(self.optimizer)
        norm = self.clip()
        metrics["grad_norm"] = norm
        skipped = ~(norm.isfinite() & metrics["loss"].isfinite())
        skipped = self.ranks.all_reduce(skipped.int()) > 0  # all processes must do the same
        self._apply(skipped)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.task.module, step)
        return metrics, skipped

    def backward(self, batch: Batch, micro_batch: int | None = None) -> dict[str, Tensor]:
        """Leave the batch's gradient in the weights, part by part, and return its metrics.

        A part counts by its images, so the last, short one has its right weight. `micro_batch` overrides the run's.
        """
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Tensor] = {}
        parts = batch.split(micro_batch or self.micro_batch)
        for number, part in enumerate(parts, 1):
            share = len(part) / len(batch)
            with self._exchange(number == len(parts)):
                with autocast(self.device, self.precision):
                    output = self.network(part)
                self.scaler.scale(output.loss * share).backward()
            for name, value in output.metrics.items():
                metrics[name] = metrics[name] + share * value if name in metrics else share * value
        return metrics

    def clip(self) -> Tensor:
        """Scale the gradient down to the largest norm, where there is one; return the norm before."""
        weights = [weight for weight in self.network.parameters() if weight.grad is not None]
        norm: Any = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if self.largest is not None:
            nn.utils.clip_grads_with_norm_(weights, self.largest, norm)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole.detach()

    def _exchange(self, last: bool) -> AbstractContextManager[None]:
        """Let processes add up their gradients only once, with the last part."""
        module: Any = self.task.module
        if hasattr(module, "set_requires_gradient_sync"):  # FSDP
            module.set_requires_gradient_sync(last)
        no_sync = getattr(self.network, "no_sync", None)  # DDP
        context: AbstractContextManager[None] = no_sync() if no_sync and not last else nullcontext()
        return context

    def _apply(self, skipped: Tensor) -> None:
        """Step, except where `skipped`; the interface of torch's gradient scaler for fused optimizers."""
        if not skips_on_device(self.optimizer):
            if not bool(skipped):
                self.optimizer.step()
            return
        optimizer: Any = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf


class Meter:
    """Means of metrics over steps, and counts of skipped ones, kept on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.skipped = torch.zeros((), dtype=torch.float64, device=device)  # since the last reading
        self.in_a_row = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, metrics: dict[str, Tensor], skipped: Tensor) -> None:
        """Add one step's scalars; those of a skipped step are left out of the means."""
        for name, value in metrics.items():
            value = torch.where(skipped, 0.0, value.detach().double())
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.skipped = self.skipped + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped

    def tensors(self) -> dict[str, Tensor]:
        """Return everything but the number of steps, by name."""
        return self.sums | {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def take(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Undo `tensors`."""
        self.sums, self.steps = dict(tensors), steps
        self.skipped, self.in_a_row = self.sums.pop("skipped"), self.sums.pop("in_a_row")

    def read(self, ranks: Ranks) -> tuple[dict[str, float], int, int]:
        """Return means, steps skipped since the last reading, and skipped in a row; then start anew.

        The one place where training waits for the device.
        """
        stacked = torch.stack([*self.sums.values(), self.skipped, self.in_a_row])
        *sums, skipped, in_a_row = ranks.all_reduce(stacked).div(ranks.world_size).tolist()
        counted = self.steps - skipped
        means = {
            name: total / counted if counted else float("nan") for name, total in zip(self.sums, sums, strict=True)
        }
        self.sums, self.steps, self.skipped = {}, 0, torch.zeros_like(self.skipped)
        return means, round(skipped), round(in_a_row)
