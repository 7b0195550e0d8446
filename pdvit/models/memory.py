"""Whether a model fits in memory, asked before it is built."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pdvit.errors import UserError

GIB = 2**30
MEMINFO = Path("/proc/meminfo")


def available() -> int | None:
    """Return the bytes of memory that new tensors can have; None where the system (other than Linux) does not say."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", MEMINFO.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def check_fits(tensors: Iterable[Tensor], where: str) -> None:
    """Raise UserError where tensors, on the meta device perhaps, are more than the memory that is left.

    Where what follows is built on the meta device too, nothing is asked.
    """
    if torch.get_default_device().type == "meta":
        return
    check_bytes(sum(tensor.numel() * tensor.element_size() for tensor in tensors), where)


def check_bytes(needed: int, where: str) -> None:
    """Raise UserError where so many bytes are more than the memory that is left."""
    left = available()
    if left is not None and needed > left:
        what = (
            f"the model is too big for memory: its weights take {needed / GIB:.1f} GiB, {left / GIB:.1f} GiB are left"
        )
        tip = "use a machine with more memory, end other programs, or take a smaller model or smaller images"
        raise UserError(what, where, tip)
