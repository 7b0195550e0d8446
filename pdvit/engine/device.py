"""Device and precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from pdvit.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device that a configuration asks for; `auto` takes a GPU where there is one.

    Raises UserError for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split(". ")[0].split(": ")[0]
        if len(reason) > 80:  # torch lists every backend that was ever thought of
            reason = "torch does not know it"
        raise UserError(f"no device '{name}' here: {reason}", "run.device (--device)", "try --device cpu") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"pdvit does not run on '{name}'", "run.device (--device)", "use cpu or cuda")
    return device


def device_name(device: torch.device) -> str:
    """Return what the hardware calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return the context of forward passes in `fp32` or `bf16`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
