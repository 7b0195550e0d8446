"""What this machine can do, looked up or tried. What goes wrong is a finding too; nothing here raises."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import distributed

from pdvit import __version__
from pdvit.tracking.environment import installed_version, processor

CORE = (
    *("torch", "torchvision", "timm", "safetensors", "typer", "rich", "pandas", "matplotlib", "scipy"),
    *("scikit-learn", "pillow", "tomli-w"),
)
EXTRAS = ("tensorboard", "wandb", "trackio")
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CGROUP = Path("/sys/fs/cgroup")
GIB = 2**30
LONGEST = 100  # characters of somebody else's error message

COMPILE_SECONDS = 120.0  # a cold start takes 20 s on two slow cores
COMPILED = """
import sys, torch
def function(x):
    y = x * 2
    return y + 1
x = torch.ones(8, device=sys.argv[1])
assert torch.equal(torch.compile(function)(x), function(x)), "compiled code gives other numbers"
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for or tried: there and working, not there, or broken.

    `detail` says what there is, or why there is nothing; without a `needed` thing training does not work.
    """

    mark: Literal["ok", "missing", "failed"]
    detail: str = ""
    tip: str = ""
    needed: bool = False


Findings = dict[str, Finding]


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


def precisions(device: torch.device) -> Findings:
    """Try each number format in a small matrix product on the device."""
    return {name: _precision(device, name) for name in PRECISIONS}


def compilation(device: torch.device) -> Findings:
    """Find the C++ compiler, and compile a small function for the device."""
    name = os.environ.get("CXX") or "g++"  # where torch looks for it
    compiler = next((found for word in name.split()[:1] if (found := shutil.which(word))), None)
    if compiler is None:
        lacking = Finding("missing", f"'{name}' not found", "install g++, or name another compiler in CXX")
        # Code for GPUs is made without it.
        compiled = Finding("missing", "needs a C++ compiler") if device.type == "cpu" else _compile(device)
        return {"C++ compiler": lacking, "torch.compile": compiled}
    return {"C++ compiler": Finding("ok", compiler), "torch.compile": _compile(device)}


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


def reason(error: BaseException) -> str:
    """Return the first sentence of an error: torch's go on for a paragraph."""
    return _shorten(str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")) or type(error).__name__


def _shorten(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."


def _granted(file: str) -> list[float]:
    """Read the numbers of a control group's limit; fewer than usual where there is none ("max")."""
    try:
        return [float(word) for word in (CGROUP / file).read_text().split() if word.isdigit()]
    except OSError:
        return []


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None where none answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


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


def _precision(device: torch.device, name: str) -> Finding:
    """Multiply matrices of ones, which is exact in every format, so that anything else is a fault."""
    dtype, before = PRECISIONS[name], torch.get_float32_matmul_precision()
    try:
        if lacking := _lacks(device, name):
            return Finding("missing", lacking)
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        ones = torch.ones(64, 64, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            product = ones @ ones
        sound = product.dtype == dtype and bool((product == 64).all())
    except Exception as error:
        return Finding("failed", reason(error))
    finally:
        torch.set_float32_matmul_precision(before)
    return Finding("ok") if sound else Finding("failed", "a matrix product came out wrong")


def _lacks(device: torch.device, name: str) -> str | None:
    """Return why torch would quietly compute in another format; None where it would not."""
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        return "only on GPUs of compute capability 8.0 and later"
    if name == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):  # torch asks about the current one
            return None if torch.cuda.is_bf16_supported(including_emulation=False) else "only emulated here"
    return None


def _compile(device: torch.device) -> Finding:
    """Compile in another process: a broken toolchain may hang it or kill it, but not us."""
    begun = time.monotonic()
    try:
        # An empty cache, so that nothing compiled earlier passes for a working compiler.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            status, said = _run([sys.executable, "-c", COMPILED, str(device)], cache)
    except subprocess.TimeoutExpired:
        return Finding("failed", f"no answer in {COMPILE_SECONDS:g} s", "see whether the compiler hangs")
    except OSError as error:
        return Finding("failed", reason(error))
    if status == 0:
        return Finding("ok", f"in {time.monotonic() - begun:.0f} s")
    if status < 0:
        return Finding("failed", f"ended by a signal: {signal.strsignal(-status)}", "see whether memory runs out")
    return Finding("failed", _complaint(said), "needed for torch.compile only")


def _run(command: list[str], cache: str) -> tuple[int, str]:
    """Run in a session of its own, which ends as a whole: the compilers that it started too."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said = process.communicate(timeout=COMPILE_SECONDS)[1]
        except BaseException:  # Ctrl-C too: another session does not hear it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


def _complaint(said: str) -> str:
    """Pick the line of a compiler's or Python's output that says what is wrong: the last that names an error."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error:", line, re.IGNORECASE)]
    return _shorten([*lines, *errors][-1]) if lines else "no reason given"
