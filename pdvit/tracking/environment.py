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
    name = Path(sys.argv[0]).name
    return shlex.join(["pdvit" if name == "__main__.py" else name, *sys.argv[1:]])


def describe_environment(device: str) -> dict[str, Any]:
    """Return the content of environment.json; `device` is torch's name of the accelerator, or "cpu"."""
    commit, git = None, ["git", "-C", str(Path(__file__).parent)]
    with suppress(OSError, subprocess.SubprocessError):  # outside of pdvit's repository there is no commit
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=5, check=True)
        describe = [*git, "describe", "--always", "--dirty=+", "--exclude=*"]  # + if there are changes
        commit = subprocess.check_output(describe, stderr=subprocess.DEVNULL, text=True, timeout=5).strip()
    return {
        "pdvit": __version__,
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": describe_cpu()["model"],
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        "commit": commit,
        "command": command_line(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is missing."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def describe_cpu() -> dict[str, str]:
    """Return the processor's model, cores and memory. A container's limits are below what the system reports."""
    model = platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    cores, memory = float(len(os.sched_getaffinity(0))), float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # "max" is no number
        quota, period = map(float, (CGROUP / "cpu.max").read_text().split())
        cores = min(cores, quota / period)
    with suppress(OSError, ValueError):
        memory = min(memory, float((CGROUP / "memory.max").read_text()))
    return {"model": model, "cores": f"{cores:g}", "memory": f"{memory / 2**30:.1f} GiB"}
