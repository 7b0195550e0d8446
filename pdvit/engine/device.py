"""Device and precision."""

import ctypes
import os
from contextlib import suppress
from dataclasses import replace

import torch

from pdvit.config.schema import RunConfig
from pdvit.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# The type of forward passes by precision; `auto` is what `set_up` makes of it, and fp32 without it.
DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in RuntimeErrors


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return a device, for `auto` a GPU if there is one; several processes here use the GPU of their `local_rank`."""
    where = "run.device (--device)"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and local_rank is not None:
        if name != "cuda":
            tip = "use --device cuda: each uses its own GPU"
            raise UserError(f"several processes can't share '{name}'", where, tip)
        name = f"cuda:{local_rank}"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"pdvit does not run on '{name}'", where, "use cpu or cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the last: a torch without CUDA
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"no device '{name}' here: {reason}", where, "try --device cpu") from error
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def visible_gpus() -> list[str]:
    """Return, for each GPU that this process sees, the CUDA_VISIBLE_DEVICES of a process that sees it alone."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def device_name(device: torch.device) -> str:
    """Return the name of the hardware."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of forward passes in a precision of `DTYPES`."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def set_up(device: torch.device, run: RunConfig) -> RunConfig:
    """Choose torch's kernels for a run; return its settings, with the precision that `auto` stands for.

    That is bf16 on a GPU that has it, else fp32. Raises UserError for bf16 on a GPU without it.
    """
    precision = "fp32" if run.precision == "auto" else run.precision
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # `torch.cuda.is_bf16_supported` would answer for the current device.
        if torch.cuda.get_device_capability(device) >= (8, 0):
            precision = "bf16" if run.precision == "auto" else precision
        elif precision == "bf16":
            what = f"{device_name(device)} has no bfloat16"
            raise UserError(what, "run.precision (--precision)", "use --precision fp16 or fp32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.tf32
    else:
        with suppress(OSError, AttributeError):  # only glibc has these settings
            # By default large activations are returned to the system, and faulted in again at every step.
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, 2**30)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if run.deterministic:
        # cuBLAS reads it when it is first used; without it torch refuses deterministic products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic)
    return replace(run, precision=precision)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device has no memory left."""
    full = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    return full or isinstance(error, torch.OutOfMemoryError)
