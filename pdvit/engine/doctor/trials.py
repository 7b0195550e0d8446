"""What the machine can do: number formats and compilers, tried."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import torch

from pdvit.engine.doctor.findings import Finding, Findings, reason, shorten

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_SECONDS = 120.0  # a cold start takes 20 s on two slow cores
COMPILED = """
import sys, torch
def function(x):
    y = x * 2
    return y + 1
x = torch.ones(8, device=sys.argv[1])
assert torch.equal(torch.compile(function)(x), function(x)), "compiled code gives other numbers"
"""


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
    return shorten([*lines, *errors][-1]) if lines else "no reason given"
