import os
import re
import time
import tomllib
import types
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from pdvit.engine import doctor
from pdvit.engine.doctor import Finding

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def marks(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.mark for name, finding in found.items()}


def test_the_core_packages_are_those_that_the_project_names():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]] == list(doctor.machine.CORE)


def test_versions_are_those_that_are_installed():
    found = doctor.versions()
    assert found["torch"] == Finding("ok", version("torch"), needed=True)
    assert set(marks(found).values()) == {"ok"}


def test_a_core_package_that_is_not_there_is_needed(monkeypatch):
    monkeypatch.setattr(doctor.machine, "CORE", ("torch", "no-such-package"))
    absent = doctor.versions()["no-such-package"]
    assert (absent.mark, absent.needed) == ("missing", True)
    assert "pip install" in absent.tip


@pytest.mark.parametrize(
    ("limits", "cores", "memory"),
    [
        ({"cpu.max": "50000 100000", "memory.max": str(2**30)}, "0.5", "1.0 GiB"),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ({"cpu.max": "99900000 100000", "memory.max": str(2**60)}, None, None),
        ({}, None, None),
    ],
    ids=["less", "no limit", "more", "no files"],
)
def test_a_container_is_granted_its_quota(monkeypatch, tmp_path, limits, cores, memory):
    monkeypatch.setattr(doctor.machine, "CGROUP", tmp_path)
    for name, text in limits.items():
        (tmp_path / name).write_text(text + "\n")
    found = doctor.cpu()
    kilobytes = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1])
    assert found["cores"].detail == (cores or str(len(os.sched_getaffinity(0))))
    assert found["memory"].detail == (memory or f"{kilobytes / 2**20:.1f} GiB")
    assert found["model"].detail


@pytest.mark.parametrize(
    ("built", "chosen", "error", "said"),
    [
        (False, None, None, "built without CUDA"),
        (True, None, RuntimeError("Found no driver. Please look."), "Found no driver"),
        (True, "7", RuntimeError("No CUDA GPUs are available"), "CUDA_VISIBLE_DEVICES is '7'"),
        (True, None, None, "sees none"),
    ],
)
def test_why_there_is_no_gpu_is_said(monkeypatch, built, chosen, error, said):
    def init():
        if error:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    found = doctor.gpus()["cuda"]["GPU"]
    assert (found.mark, found.needed) == ("missing", False)
    assert said in f"{found.detail} {found.tip}"
    assert "Please" not in found.detail


@pytest.fixture
def two_gpus(monkeypatch):
    """Let torch tell of two GPUs, the second of which does not answer."""

    def properties(index):
        if index == 1:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with a flag.")
        return types.SimpleNamespace(name="Made GPU", major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (8 * 2**30, 80 * 2**30))


def test_every_gpu_is_described(two_gpus):
    found = doctor.gpus()
    assert list(found) == ["cuda:0", "cuda:1"]
    assert {name: finding.detail for name, finding in found["cuda:0"].items()} == {
        "model": "Made GPU",
        "memory": "80.0 GiB (8.0 free)",
        "compute capability": "9.0",
    }
    broken = found["cuda:1"]["GPU"]
    assert (broken.mark, broken.needed) == ("failed", True)
    assert broken.detail == "CUDA error: uncorrectable ECC error encountered"


def test_the_driver_is_the_one_that_its_tool_names(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tool.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    tool.chmod(0o755)
    assert doctor.versions()["NVIDIA driver"].detail == "550.54.15"
    tool.write_text("#!/bin/sh\necho it failed\nexit 9\n")
    assert "NVIDIA driver" not in doctor.versions()


def test_precisions_of_a_cpu():
    before = torch.get_float32_matmul_precision()
    found = doctor.precisions(CPU)
    assert marks(found) == {"fp32": "ok", "tf32": "missing", "bf16": "ok", "fp16": "ok"}
    assert "GPU" in found["tf32"].detail
    assert torch.get_float32_matmul_precision() == before


def test_wrong_numbers_are_a_failure(monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **options: ones(*size, **options) * 1.5)
    assert doctor.precisions(CPU)["bf16"].mark == "failed"


def test_an_autocast_that_does_nothing_is_a_failure(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    assert marks(doctor.precisions(CPU)) == {"fp32": "ok", "tf32": "missing", "bf16": "failed", "fp16": "failed"}


def test_a_product_that_raises_is_a_failure_with_its_reason(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no kernel image is available.\nMore.")

    monkeypatch.setattr(torch, "autocast", refuse)
    assert doctor.precisions(CPU)["fp32"] == Finding("failed", "no kernel image is available")


def test_an_old_gpu_has_neither_tf32_nor_bf16_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert "8.0" in doctor.precisions(GPU)["tf32"].detail
    assert doctor.precisions(GPU)["bf16"] == Finding("missing", "only emulated here")
    assert set(asked) == {False}


@pytest.mark.gpu
def test_a_gpu_has_what_its_generation_promises():
    found = doctor.gpus()["cuda:0"]
    assert found["model"].detail == torch.cuda.get_device_name(0)
    recent = torch.cuda.get_device_capability(0) >= (8, 0)
    fate = "ok" if recent else "missing"
    assert marks(doctor.precisions(GPU)) == {"fp32": "ok", "tf32": fate, "bf16": fate, "fp16": "ok"}


@pytest.mark.slow
def test_a_function_is_really_compiled():
    found = doctor.compilation(CPU)
    assert marks(found) == {"C++ compiler": "ok", "torch.compile": "ok"}, found


@pytest.mark.slow
def test_a_broken_compiler_is_found_out(monkeypatch):
    monkeypatch.setenv("CXX", "false")  # it is there, and compiles nothing
    found = doctor.compilation(CPU)
    assert marks(found) == {"C++ compiler": "ok", "torch.compile": "failed"}
    assert "ompiler" in found["torch.compile"].detail


@pytest.mark.parametrize("name", ["/nowhere/g++", "no-such-compiler -O2", '"'])
def test_no_compiler_is_not_a_failure(monkeypatch, name):
    monkeypatch.setenv("CXX", name)
    found = doctor.compilation(CPU)
    assert marks(found) == {"C++ compiler": "missing", "torch.compile": "missing"}
    assert name in found["C++ compiler"].detail
    assert "CXX" in found["C++ compiler"].tip


def test_the_compiler_is_found_where_torch_looks(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.trials, "COMPILED", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.compilation(CPU)["C++ compiler"].detail == "'g++' not found"
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert doctor.compilation(CPU)["C++ compiler"] == Finding("ok", str(tmp_path / "g++"))


@pytest.fixture
def compiling(monkeypatch):
    """Return a function that runs another program in place of the one that compiles."""
    monkeypatch.setenv("CXX", "true")

    def run(program: str) -> Finding:
        monkeypatch.setattr(doctor.trials, "COMPILED", program)
        return doctor.compilation(CPU)["torch.compile"]

    return run


def test_the_compiling_process_gets_the_device_and_an_empty_cache(compiling):
    program = """
import os, sys
assert sys.argv[1:] == ["cpu"]
assert os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == []
"""
    assert compiling(program) == Finding("ok", "in 0 s")


def test_a_crash_is_survived(compiling):
    found = compiling("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert found.mark == "failed"
    assert "Segmentation fault" in found.detail


def test_the_reason_is_the_last_line_that_names_an_error(compiling):
    found = compiling("raise RuntimeError('x.cpp:1: fatal error: Python.h: No such file\\nSet VERBOSE=1 for more')")
    assert (found.mark, found.detail) == ("failed", "RuntimeError: x.cpp:1: fatal error: Python.h: No such file")
    assert compiling("raise SystemExit('odd')").detail == "odd"
    assert compiling("raise SystemExit(3)").detail == "no reason given"
    assert len(compiling("raise SystemExit('long ' * 1000)").detail) == doctor.findings.LONGEST


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(compiling, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.trials, "COMPILE_SECONDS", 1.0)
    file = tmp_path / "pid"
    begun = time.monotonic()
    found = compiling(f"""
import subprocess
child = subprocess.Popen(["sleep", "60"])
open({str(file)!r}, "w").write(str(child.pid))
child.wait()
""")
    assert found == Finding("failed", "no answer in 1 s", "see whether the compiler hangs")
    assert time.monotonic() - begun < 20
    assert not running(int(file.read_text()))


def running(pid: int) -> bool:
    """Say whether a process still does something: one that nobody has waited for yet does not."""
    for _ in range(100):  # the signal takes a moment
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state in "ZX":
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(("cuda", "nccl"), [(True, "ok"), (False, "missing")])
def test_nccl_needs_a_gpu(monkeypatch, cuda, nccl):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: True)
    assert marks(doctor.backends()) == {"gloo": "ok", "nccl": nccl}


def test_a_torch_without_distribution_is_said(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert marks(doctor.backends()) == {"torch.distributed": "missing"}


def test_extras_are_optional(monkeypatch):
    monkeypatch.setattr(doctor.machine, "EXTRAS", ("torch", "no-such-package"))
    found = doctor.extras()
    assert found["torch"] == Finding("ok", version("torch"))
    assert (found["no-such-package"].mark, found["no-such-package"].needed) == ("missing", False)


@pytest.mark.parametrize("name", [".", "runs", "not/yet/there"])
def test_a_place_is_tried_and_left_as_it_was(workplace, name):
    found = doctor.place(Path(name))
    assert marks(found) == {"folder": "ok", "free": "ok", "writable": "ok"}
    assert found["folder"].detail == str(workplace / name)
    status = os.statvfs(workplace)
    free = float(found["free"].detail.removesuffix(" GiB"))
    assert free == pytest.approx(status.f_bavail * status.f_frsize / 2**30, abs=1)
    assert list(workplace.iterdir()) == []


def test_a_file_in_the_way_is_found(workplace):
    Path("runs").write_text("")
    found = doctor.place(Path("runs"))["writable"]
    assert (found.mark, found.needed) == ("failed", True)
    assert found.detail == f"{workplace / 'runs'}: Not a directory"
    assert "--out" in found.tip


def test_a_link_to_nowhere_is_found(workplace):
    Path("runs").symlink_to("nowhere")
    assert doctor.place(Path("runs"))["writable"].mark == "failed"


def test_a_full_disk_is_found(workplace, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.machine.tempfile, "TemporaryFile", full)
    assert "No space left" in doctor.place(Path("runs"))["writable"].detail


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_found(workplace):
    workplace.chmod(0o555)
    assert "Permission denied" in doctor.place(Path("runs"))["writable"].detail
