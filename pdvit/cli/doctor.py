"""`pdvit doctor`: one screen about this machine."""

import json
import os
import platform
import shutil
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from textwrap import fill
from typing import Annotated, Any

import typer

from pdvit.errors import UserError
from pdvit.tracking.environment import describe_cpu, installed_version
from pdvit.tracking.run_directory import RUNS
from pdvit.version import __version__

REQUIRED: tuple[str, ...] = ("torch", "torchvision", "timm", "safetensors", "typer", "rich", "pandas", "matplotlib")
REQUIRED += ("scipy", "scikit-learn", "pillow", "psutil", "jinja2", "tomli-w", "segmentation-models-pytorch")
REQUIRED += ("submitit",)
EXTRAS, GIB = ("tensorboard", "wandb", "trackio"), 2**30


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON and nothing else.")] = False,
) -> int:
    """Check this machine: versions, devices, a training step, disk."""
    found = _examine()
    items = [(topic, name, *item.values()) for topic, group in found.items() for name, item in group.items()]
    broken = [f"{topic} {name}" for topic, name, mark, _, _, needed in items if needed and mark != "ok"]
    if as_json:
        print(json.dumps({"ready": not broken, "findings": found}, indent=2))
        return 1 if broken else 0
    rows: dict[tuple[str, str, str], list[str]] = {}  # checks with the same outcome share a row
    for topic, name, mark, detail, tip, _ in items:
        reason = "" if mark == "ok" else f": {detail} ({tip})"
        rows.setdefault((topic, mark, reason), []).append(name if reason else f"{name} {detail}".strip())
    for (topic, mark, reason), names in rows.items():
        text, width = ", ".join(names) + reason, shutil.get_terminal_size().columns
        print(fill(text, width, initial_indent=f"{topic:<10}{mark:<9}", subsequent_indent=" " * 19))
    print(f"\nnot ready: {', '.join(broken)}" if broken else "\nready: pdvit train")
    return 1 if broken else 0


def _check(check: Callable[[], str | None], tip: str = "", needed: bool = False) -> dict[str, Any]:
    """Run a check, which returns a detail, or None for a missing package; its error is the reason of a failure."""
    try:
        found = check()
        mark, detail, tip = ("ok", found, "") if found is not None else ("missing", "not installed", tip)
    except Exception as error:  # a broken installation fails anywhere, with any kind of error
        mark, tip = ("missing", error.tip) if isinstance(error, UserError) else ("failed", tip)
        detail = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")[:100] or type(error).__name__
    return {"mark": mark, "detail": detail, "tip": tip, "needed": needed}


def _examine() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the checks by topic and name."""
    import timm, torch, torchvision  # noqa: E401, F401, I001  # an error for all commands if one can't be imported

    gpus, runs = [f"cuda:{index}" for index in range(torch.cuda.device_count())], RUNS.absolute()
    place = next(path for path in (runs, *runs.parents) if os.path.lexists(path))
    versions = {"pdvit": __version__, "python": platform.python_version(), "CUDA of torch": torch.version.cuda}
    required = {name: _check(partial(installed_version, name), "pip install pdvit", needed=True) for name in REQUIRED}
    extras = {name: _check(partial(installed_version, name), f"pip install 'pdvit[{name}]'") for name in EXTRAS}
    no_gpu = _check(torch.cuda.init, "without a GPU pdvit uses the CPU") | {"mark": "missing"}
    return {
        "versions": {name: _check(partial(str, text)) for name, text in versions.items()} | required,
        "cpu": _device("cpu"),
        **({gpu: _device(gpu) for gpu in gpus} or {"cuda": {"GPU": no_gpu}}),
        "extras": extras,
        "runs": {
            "folder": _check(partial(str, runs)),
            "free": _check(lambda: f"{shutil.disk_usage(place).free / GIB:.1f} GiB"),
            # Permissions show neither a full disk nor an odd mount.
            "writable": _check(lambda: TemporaryDirectory(dir=place).cleanup() or "", "use --out", True),  # type: ignore[func-returns-value]
        },
    }


def _device(name: str) -> dict[str, dict[str, Any]]:
    """Check a device. A broken GPU blocks training although there is a CPU: `--device auto` takes the GPU."""
    from torch import cuda

    checks: dict[str, Callable[[], str | None]] = {
        "model": lambda: cuda.get_device_name(name),
        "memory": lambda: "{1:.1f} GiB ({0:.1f} free)".format(*(size / GIB for size in cuda.mem_get_info(name))),
        "compute capability": lambda: "{}.{}".format(*cuda.get_device_capability(name)),
    }
    precisions = {precision: partial(_step, name, precision) for precision in ("fp32", "tf32", "bf16", "fp16")}
    if name == "cpu":
        checks = {key: partial(str, text) for key, text in describe_cpu().items()}
        del precisions["tf32"]  # a format of GPUs
    checks |= precisions | {"training step": precisions["fp32"]}
    return {key: _check(check, "try another --device", key == "training step") for key, check in checks.items()}


def _step(device: str, precision: str) -> str:
    """Train a tiny model for one step with all three terms."""
    import torch

    from pdvit import DiverseModel, Objective, patch_cutmix
    from pdvit.engine.device import autocast
    from pdvit.models.build import build_model

    old = device != "cpu" and torch.cuda.get_device_capability(device) < (8, 0)
    if old and precision in ("tf32", "bf16"):
        raise UserError("needs a GPU of compute capability 8.0", device, "use --precision fp32 or fp16")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 1, "num_classes": 4}
    module = DiverseModel(build_model("vit_tiny_patch16_224", sizes)).to(device)
    images, targets = torch.rand(4, 3, 32, 32, device=device), torch.arange(4, device=device)
    mixed = patch_cutmix(images, targets, 8, 4)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    with autocast(torch.device(device), "fp32" if precision == "tf32" else precision):
        loss = Objective()(module(mixed.images), mixed.targets, mixed.patch_targets).total
    loss.backward()
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    if not all(bool(value.isfinite().all()) for value in (loss, *module.parameters())):
        raise RuntimeError(f"loss {loss.item():.3g}, or weights that are not finite")
    return f"(loss {loss.item():.2f})"
