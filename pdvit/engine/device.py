"""Device and precision."""

import ctypes
import os
from contextlib import suppress

import torch

from pdvit.config.schema import RunConfig
from pdvit.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
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
    """Return the context of forward passes in `fp32`, `bf16` or `fp16`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def set_up(device: torch.device, run: RunConfig) -> None:
    """Choose torch's kernels for a run; raises UserError if the device does not support it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the question below, which is about the current device
        if run.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            what = f"{torch.cuda.get_device_name(device)} has no bfloat16"
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
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(run.deterministic)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device has no memory left."""
    full = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    return full or isinstance(error, torch.OutOfMemoryError)
