import json
import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import pdvit.losses.objective as pdvit_objective
from pdvit.cli import doctor
from pdvit.cli import run as pdvit
from pdvit.tracking import environment


@pytest.fixture(autouse=True)
def place(workplace, monkeypatch) -> Path:
    """An empty working directory and no GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("COLUMNS", "80")
    return workplace


@pytest.fixture
def examined(capsys):
    """Return a function that runs the command with --json, and returns its status and findings."""

    def examine():
        capsys.readouterr()
        status = pdvit(["doctor", "--json"])
        shown = capsys.readouterr()
        assert shown.err == ""
        report = json.loads(shown.out)
        assert report["ready"] == (status == 0)
        return status, report["findings"]

    return examine


def test_a_sound_machine_is_ready_and_the_screen_shows_all_findings_in_thirty_lines(examined, place, capsys):
    status, found = examined()
    assert status == 0
    assert list(found) == ["versions", "cpu", "cuda", "extras", "runs"]
    assert found["versions"]["torch"] == {"mark": "ok", "detail": version("torch"), "tip": "", "needed": True}
    marks = {name: item["mark"] for name, item in found["cpu"].items()}
    assert set(marks) == {"model", "cores", "memory", "fp32", "bf16", "fp16", "training step"}
    assert set(marks.values()) == {"ok"}
    assert (found["cuda"]["GPU"]["mark"], found["cuda"]["GPU"]["needed"]) == ("missing", False)
    assert found["runs"]["folder"]["detail"] == str(place / "runs")
    assert list(place.iterdir()) == []
    assert pdvit(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "ready: pdvit train"
    letters = "".join("".join(lines).split())  # long words are cut at the end of a line
    for topic, group in found.items():
        assert topic in letters
        for name, item in group.items():
            shown = [name, item["tip"]] if topic in ("cpu", "runs") else [name, item["detail"], item["tip"]]
            assert all("".join(text.split()) in letters for text in shown)  # losses and free space change


def test_the_required_packages_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert names == set(doctor.REQUIRED)
    assert set(doctor.EXTRAS) <= set(project["optional-dependencies"])


def test_only_a_required_package_that_is_missing_is_a_failure(examined, monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", ("no-such-package",))
    status, found = examined()
    assert (status, found["extras"]["no-such-package"]["mark"]) == (0, "missing")
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-package"))
    status, found = examined()
    assert (status, found["versions"]["no-such-package"]["mark"]) == (1, "missing")
    assert "pip install" in found["versions"]["no-such-package"]["tip"]


def test_a_container_has_the_cores_and_memory_of_its_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "CGROUP", tmp_path)
    whole = environment.describe_cpu()
    kilobytes = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1])
    assert whole["cores"] == str(len(os.sched_getaffinity(0)))
    assert whole["memory"] == f"{kilobytes / 2**20:.1f} GiB"
    none = (whole["cores"], whole["memory"])
    for cores, memory, expected in (("max 100000", 2**60, none), ("50000 100000", 2**30, ("0.5", "1.0 GiB"))):
        (tmp_path / "cpu.max").write_text(f"{cores}\n")
        (tmp_path / "memory.max").write_text(f"{memory}\n")
        found = environment.describe_cpu()
        assert (found["cores"], found["memory"]) == expected


def test_a_loss_that_is_not_finite_is_a_failure(examined, monkeypatch):
    monkeypatch.setattr(pdvit_objective, "cosine_loss", lambda last, variant: last.sum() * float("nan"))
    status, found = examined()
    assert (status, found["cpu"]["training step"]["mark"]) == (1, "failed")
    assert "nan" in found["cpu"]["training step"]["detail"]


def test_an_old_gpu_has_neither_tf32_nor_bf16_and_a_broken_one_is_a_failure(examined, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    status, findings = examined()
    found = findings["cuda:0"]
    assert (status, found["training step"]["mark"]) == (1, "failed")  # although the CPU works
    assert findings["cpu"]["training step"]["mark"] == "ok"
    facts = {name: found[name]["detail"] for name in ("model", "memory", "compute capability")}
    assert facts == {"model": "T4", "memory": "80.0 GiB (8.0 free)", "compute capability": "7.5"}
    assert all(found[name]["mark"] == "missing" and "8.0" in found[name]["detail"] for name in ("tf32", "bf16"))
    assert {found[name]["tip"] for name in ("tf32", "bf16")} == {"use --precision fp32 or fp16"}


@pytest.mark.gpu
def test_a_gpu_has_the_precisions_of_its_generation(examined, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = examined()[1]["cuda:0"]
    assert found["model"]["detail"] == torch.cuda.get_device_name(0)
    recent = "ok" if torch.cuda.get_device_capability(0) >= (8, 0) else "missing"
    marks = {name: found[name]["mark"] for name in ("fp32", "tf32", "bf16", "fp16", "training step")}
    assert marks == {"fp32": "ok", "tf32": recent, "bf16": recent, "fp16": "ok", "training step": "ok"}


@pytest.mark.parametrize("fault", ["link", "full", "permission"])
def test_a_place_that_can_not_be_written_is_a_failure(place, monkeypatch, capsys, fault):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if fault == "link":
        Path("runs").symlink_to("nowhere")
    elif fault == "full":
        monkeypatch.setattr(doctor, "TemporaryDirectory", full)
    elif os.geteuid() == 0:
        pytest.skip("root can write anywhere")
    else:
        place.chmod(0o555)
    assert pdvit(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "not ready: runs writable"
