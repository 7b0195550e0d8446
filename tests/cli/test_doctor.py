import json
import sys
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pdvit.engine.doctor as probes
import pdvit.engine.update as pdvit_update
import pdvit.losses.objective as pdvit_objective
from pdvit.cli import doctor
from pdvit.cli import run as pdvit
from pdvit.engine.doctor import Finding

TOPICS = ["versions", "cpu", "cuda", "compile", "distributed", "extras", "runs"]


@pytest.fixture(autouse=True)
def place(workplace, monkeypatch) -> Path:
    """An empty working directory, no GPU, and nothing compiled: that alone takes longer than all the rest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probes.trials, "COMPILED", "")
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setenv("COLUMNS", "80")
    return workplace


@pytest.fixture
def examined(capsys):
    """Return a function that runs the command with --json, and returns its status and what was printed."""

    def examine():
        capsys.readouterr()
        status = pdvit(["doctor", "--json"])
        shown = capsys.readouterr()
        assert shown.err == ""
        return status, json.loads(shown.out)

    return examine


def test_a_sound_machine_is_ready(examined, place):
    status, report = examined()
    assert status == 0
    assert report["ready"] is True
    found = report["findings"]
    assert list(found) == TOPICS
    assert found["versions"]["torch"]["detail"] == version("torch")
    assert found["cpu"]["training step"]["mark"] == "ok"
    assert found["cpu"]["fp32"]["mark"] == "ok"
    assert found["compile"]["torch.compile"]["mark"] == "ok"
    assert found["runs"]["folder"]["detail"] == str(place / "runs")
    assert list(place.iterdir()) == []


def test_the_screen_fits_and_says_what_json_says(examined, capsys):
    _, report = examined()
    assert pdvit(["doctor"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "ready: pdvit train"
    letters = "".join(shown.out.split())  # long words are cut at the end of a line
    for topic, found in report["findings"].items():
        assert topic in shown.out
        for name, finding in found.items():
            if topic not in ("compile", "runs"):  # seconds and free space change
                assert "".join(name.split()) in letters
                assert "".join(finding["detail"].split()) in letters
            if finding["mark"] != "ok":
                assert "".join(finding["tip"].split()) in letters


def test_the_screen_fits_eight_gpus():
    fine = Finding("ok")
    gpu = {
        "model": Finding("ok", "NVIDIA H100 80GB HBM3"),
        "memory": Finding("ok", "79.2 GiB (78.7 free)"),
        "compute capability": Finding("ok", "9.0"),
        **dict.fromkeys(("fp32", "tf32", "bf16", "fp16"), fine),
        "training step": Finding("ok", "(loss 3.72)", needed=True),
    }
    out = StringIO()
    Console(file=out, width=100).print(doctor._screen({f"cuda:{index}": gpu for index in range(8)}))
    assert len(out.getvalue().splitlines()) <= 16


def test_an_unwritable_place_is_a_failure(examined, capsys):
    Path("runs").write_text("in the way")
    status, report = examined()
    assert status == 1
    assert report["ready"] is False
    assert report["findings"]["runs"]["writable"]["mark"] == "failed"
    assert pdvit(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "not ready: runs writable"


def test_no_compiler_is_said_and_is_no_failure(examined, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    status, report = examined()
    assert status == 0
    assert report["ready"] is True
    assert report["findings"]["compile"]["C++ compiler"]["mark"] == "missing"
    assert pdvit(["doctor"]) == 0
    assert "'/nowhere/g++' not found" in capsys.readouterr().out


def test_a_step_that_breaks_is_a_failure(examined, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(pdvit_update, "make_optimizer", refuse)
    status, report = examined()
    assert status == 1
    step = report["findings"]["cpu"]["training step"]
    assert (step["mark"], step["detail"]) == ("failed", "no kernel image is available")
    assert step["tip"]


def test_a_step_without_a_number_is_a_failure(examined, monkeypatch):
    monkeypatch.setattr(pdvit_objective, "cosine_loss", lambda last, variant: last.sum() * float("nan"))
    status, report = examined()
    assert status == 1
    step = report["findings"]["cpu"]["training step"]
    assert step["mark"] == "failed"
    assert "nan" in step["detail"]


def test_a_gpu_that_breaks_is_a_failure_and_the_rest_is_still_said(examined, monkeypatch):
    monkeypatch.setattr(probes, "gpus", lambda: {"cuda:99": {"model": Finding("ok", "one that is not there")}})
    status, report = examined()
    assert status == 1
    assert report["findings"]["cuda:99"]["training step"]["mark"] == "failed"
    assert report["findings"]["cpu"]["training step"]["mark"] == "ok"
    assert report["findings"]["runs"]["writable"]["mark"] == "ok"


def test_an_installation_that_can_not_be_imported_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert pdvit(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    what, tip = shown.err.splitlines()
    assert what.startswith("error: torchvision can't be imported")
    assert "pip install" in tip


def test_what_a_device_computes_does_not_change_how_torch_does(examined):
    before = torch.get_float32_matmul_precision()
    examined()
    assert torch.get_float32_matmul_precision() == before
