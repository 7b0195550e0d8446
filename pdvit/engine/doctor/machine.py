"""What the machine has: looked up, not tried."""

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import distributed

from pdvit import __version__
from pdvit.engine.doctor.findings import Finding, Findings, reason
from pdvit.tracking.environment import installed_version, processor

CORE = (
    *("torch", "torchvision", "timm", "safetensors", "typer", "rich", "pandas", "matplotlib", "scipy"),
    *("scikit-learn", "pillow", "tomli-w", "segmentation-models-pytorch"),
)
EXTRAS = ("tensorboard", "wandb", "trackio")
CGROUP = Path("/sys/fs/cgroup")
GIB = 2**30


def versions() -> Findings:
    """Return the versions of pdvit, Python, the packages that pdvit needs, CUDA and its driver."""
    absent = Finding("missing", "not installed", "install pdvit again: pip install .", needed=True)
    found = {name: installed_version(name) for name in CORE}
    packages = {name: Finding("ok", version, needed=True) if version else absent for name, version in found.items()}
    drivers = {"CUDA of torch": torch.version.cuda, "NVIDIA driver": _driver()}
    return {
        "pdvit": Finding("ok", __version__),
        "python": Finding("ok", platform.python_version()),
        **packages,
        **{name: Finding("ok", version) for name, version in drivers.items() if version},
    }


def cpu() -> Findings:
    """Describe the processor, and the cores and memory that this process may use."""
    cores: float = len(os.sched_getaffinity(0))
    memory: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Containers get their share by quota, which neither of the numbers above knows.
    match _granted("cpu.max"):
        case [quota, period]:
            cores = min(cores, quota / period)
    memory = min([memory, *_granted("memory.max")])
    return {
        "model": Finding("ok", processor() or platform.machine()),
        "cores": Finding("ok", f"{cores:g}"),
        "memory": Finding("ok", f"{memory / GIB:.1f} GiB"),
    }


def gpus() -> dict[str, Findings]:
    """Describe each GPU that torch can use, by its name in torch; `cuda` with the reason where there is none."""
    if not torch.cuda.is_available():
        return {"cuda": {"GPU": _no_gpu()}}
    return {f"cuda:{index}": _gpu(index) for index in range(torch.cuda.device_count())}


def backends() -> Findings:
    """Say through what several processes can train together."""
    if not distributed.is_available():
        return {"torch.distributed": Finding("missing", "this torch is built without it")}
    absent = Finding("missing", "this torch is built without it")
    gloo = Finding("ok") if distributed.is_gloo_available() else absent
    nccl = Finding("ok") if distributed.is_nccl_available() else absent
    if nccl.mark == "ok" and not torch.cuda.is_available():
        nccl = Finding("missing", "needs a GPU")
    return {"gloo": gloo, "nccl": nccl}


def extras() -> Findings:
    """Say which optional packages are installed."""
    absent = Finding("missing", "not installed", "optional: pip install what you want")
    found = {name: installed_version(name) for name in EXTRAS}
    return {name: Finding("ok", version) if version else absent for name, version in found.items()}


def place(folder: Path) -> Findings:
    """Say whether `folder` can be made or written, and how much room is left there; leaves nothing behind."""
    try:
        folder = folder.absolute()
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        free = shutil.disk_usage(nearest).free
        with tempfile.TemporaryFile(dir=nearest) as file:  # permissions don't tell about full disks and odd mounts
            file.write(b"pdvit")
    except OSError as error:
        tip = "mend it, work in another folder, or train with --out"
        return {"writable": Finding("failed", f"{folder}: {error.strerror or error}", tip, needed=True)}
    return {
        "folder": Finding("ok", str(folder)),
        "free": Finding("ok", f"{free / GIB:.1f} GiB"),
        "writable": Finding("ok", needed=True),
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None where none answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _granted(file: str) -> list[float]:
    """Read the numbers of a control group's limit; fewer than usual where there is none ("max")."""
    try:
        return [float(word) for word in (CGROUP / file).read_text().split() if word.isdigit()]
    except OSError:
        return []


def _no_gpu() -> Finding:
    if not torch.backends.cuda.is_built():
        return Finding("missing", "this torch is built without CUDA", "for a GPU install a CUDA build of torch")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    tip = "pdvit trains on the CPU" if chosen is None else f"CUDA_VISIBLE_DEVICES is '{chosen}'; unset, all are seen"
    try:
        torch.cuda.init()  # fails, and says why
    except Exception as error:
        return Finding("missing", reason(error), tip)
    return Finding("missing", "torch sees none", tip)


def _gpu(index: int) -> Findings:
    try:
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except Exception as error:
        # Needed although there is a CPU: `--device auto` takes the GPU.
        return {"GPU": Finding("failed", reason(error), "see what nvidia-smi says", needed=True)}
    return {
        "model": Finding("ok", facts.name),
        "memory": Finding("ok", f"{total / GIB:.1f} GiB ({free / GIB:.1f} free)"),
        "compute capability": Finding("ok", f"{facts.major}.{facts.minor}"),
    }
