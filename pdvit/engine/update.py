"""The optimizer, and one update of the weights."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

from pdvit.config.schema import OptimConfig
from pdvit.errors import UserError, closest

# Of timm's names, those of torch that update all weights in one kernel, on CPU and GPU.
FUSED = ("adamw", "adam", "sgd")


def make_optimizer(module: nn.Module, optim: OptimConfig) -> Optimizer:
    """Build a timm optimizer; norms, biases, position and prefix tokens are not decayed, as timm's models say.

    Raises UserError for a name that timm does not have, or an optimizer that can't run here.
    """
    name = optim.opt.lower()
    fused: dict[str, Any] = {"fused": True} if name in FUSED else {}
    try:
        optimizer = create_optimizer_v2(module, opt=optim.opt, lr=optim.lr, weight_decay=optim.weight_decay, **fused)
    except Exception as error:  # each optimizer has its own way to miss what it needs
        if name not in list_optimizers():
            tip = closest(name, map(str, list_optimizers()))
            raise UserError(f"timm has no optimizer named '{optim.opt}'", "optim.opt (--opt)", tip) from error
        reason = str(error) or type(error).__name__
        raise UserError(f"{name} can't run here: {reason}", "optim.opt (--opt)", "for example adamw") from error
    assert isinstance(optimizer, Optimizer)
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"{name} needs second derivatives", "optim.opt (--opt)", "for example adamw")
    return optimizer


def update(loss: Tensor, module: nn.Module, optimizer: Optimizer, clip: float | None) -> Tensor:
    """Run backward, clip and step; return the gradient's norm before clipping, on the device."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    largest = clip if clip is not None else float("inf")
    norm = nn.utils.clip_grad_norm_(module.parameters(), largest)
    optimizer.step()
    return norm.detach()


class Meter:
    """Means of metrics over steps, kept on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one step's scalars."""
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Return the means, and start anew; the one place where training waits for the device."""
        if not self.sums:
            return {}
        means = torch.stack(list(self.sums.values())).div(self.steps).tolist()
        result = dict(zip(self.sums, means, strict=True))
        self.sums, self.steps = {}, 0
        return result
