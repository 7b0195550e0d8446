"""Nested values as JSON with their tensors beside it, so that nothing in a checkpoint is pickled."""

from typing import Any

import torch
from torch import Tensor

# Mark what stands for something that JSON does not have.
TENSOR, DTYPE = "__tensor__", "__dtype__"


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` for JSON, with every tensor in it moved to `tensors` under its path. Raises TypeError."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, dict):
        return {str(key): pack(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [pack(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    if isinstance(value, torch.dtype):
        return {DTYPE: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint can't hold")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `pack` (tuples come back as lists)."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if DTYPE in value:
        return getattr(torch, value[DTYPE])
    return {key: unpack(item, tensors) for key, item in value.items()}
