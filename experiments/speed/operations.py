"""Operations of a forward pass: a multiplication and an addition are two."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_operations(model: nn.Module, size: int) -> int:
    """Return the operations of one image of `size` by `size` pixels; the model is on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size))
    return int(counter.get_total_flops())
