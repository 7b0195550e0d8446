"""The environment of a run: versions, hardware, commit, command line."""

import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pdvit.version import __version__

PACKAGES = ("torch", "torchvision", "timm", "numpy", "safetensors", "scikit-learn", "pillow")
CGROUP = Path("/sys/fs/cgroup")


def command_line() -> str:
    """Return the command that started this process, as typed in a shell."""
    name = Path(sys.argv[0]).name if sys.argv else "python"
    command = "pdvit" if name in ("pdvit", "__main__.py") else name
    return shlex.join([command, *sys.argv[1:]])


def describe_environment(device: str) -> dict[str, Any]:
    """Return the content of environment.json; `device` is torch's name of the accelerator, or "cpu"."""
    return {
        "pdvit": __version__,
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        "commit": _commit(),
        "command": command_line(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the model name of the processor; empty if it is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def describe_cpu() -> dict[str, str]:
    """Return the processor's model, cores and memory. A container's limits are below what the system reports."""
    cores, memory = float(len(os.sched_getaffinity(0))), float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # "max" is no number
        quota, period = map(float, (CGROUP / "cpu.max").read_text().split())
        cores = min(cores, quota / period)
    with suppress(OSError, ValueError):
        memory = min(memory, float((CGROUP / "memory.max").read_text()))
    model = processor() or platform.machine()
    return {"model": model, "cores": f"{cores:g}", "memory": f"{memory / 2**30:.1f} GiB"}


def _commit() -> str | None:
    """Return pdvit's git commit, with + if there are changes; None outside of its repository."""
    mine, describe = ["ls-files", "--error-unmatch", __file__], ["describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        for arguments in (mine, describe):
            git = ["git", "-C", str(Path(__file__).parent), *arguments]
            done = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
