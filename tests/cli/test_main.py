import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdvit import __version__
from pdvit.cli import run as pdvit

HEAVY = ("torch", "torchvision", "timm", "pandas", "matplotlib", "sklearn", "safetensors")
COMMANDS = [[], ["train"], ["analyze"], ["doctor"], ["plot"], ["plot", "similarity"], ["plot", "sweep"]]


def process(*arguments: str, script: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python, or the installed `pdvit`, with the arguments."""
    program = Path(sys.executable).with_name("pdvit") if script else sys.executable
    command = [str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )


def imported(*arguments: str) -> set[str]:
    """Return the top-level packages that a command imports, in a process of its own."""
    done = process("-X", "importtime", "-m", "pdvit", *arguments)
    assert done.returncode == 0, done.stderr[-1000:]
    names = re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE)
    assert "pdvit.cli" in names
    return {name.split(".")[0] for name in names}


def test_the_version_is_printed(capsys):
    assert pdvit(["--version"]) == 0
    assert capsys.readouterr().out == f"pdvit {__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(capsys, command, flag):
    assert pdvit([*command, flag]) == 0
    shown = capsys.readouterr()
    assert "Usage" in shown.out
    assert shown.err == ""


def test_help_lists_the_commands(capsys):
    assert pdvit(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", shown) for name in ("train", "analyze", "doctor", "plot"))


@pytest.mark.parametrize("arguments", [[], ["plot"]], ids=["pdvit", "plot"])
def test_no_command_shows_help_and_no_error(capsys, arguments):
    pdvit(arguments)
    shown = capsys.readouterr()
    assert "Usage" in shown.out + shown.err
    assert "Error" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "what", "tip"),
    [
        (["trian"], "trian", "train"),
        (["plot", "similarit"], "similarit", "similarity"),
        (["--versoin"], "--versoin", "--version"),
        (["plot", "training", "--ouut", "x.png"], "--ouut", "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistyped_word_is_answered_with_the_right_one(refusal, arguments, what, tip):
    found = refusal(*arguments)
    assert what in found.what
    assert tip in found.tip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command):
    assert not imported(*command, "--help") & {*HEAVY, "rich.console"}


def test_the_version_imports_nothing_heavy():
    assert not imported("--version") & set(HEAVY)


@pytest.mark.parametrize("kind", ["cka", "maps", "sweep", "training"])
def test_plotting_imports_no_torch(workplace, digits_run, analysis_folder, kind):
    run = analysis_folder(workplace / "made")
    (run / "cells.csv").write_text("cell,status,optim.lr,run.seed,accuracy\n0,finished,1,0,0.5\n1,finished,2,0,0.6\n")
    run = digits_run if kind == "training" else run
    packages = imported("plot", kind, str(run), "--out", "figure.png")
    assert "matplotlib" in packages
    assert not packages & {"torch", "torchvision", "timm", "safetensors"}
    assert Path("figure.png").is_file()


def test_the_module_runs_like_the_command():
    done = process("-m", "pdvit", "--version")
    assert (done.returncode, done.stdout) == (0, f"pdvit {__version__}\n")
    done = process("-m", "pdvit", "trian")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_installed_command_completes_words():
    words = {"_PDVIT_COMPLETE": "complete_bash", "COMP_WORDS": "pdvit an", "COMP_CWORD": "1"}
    done = process(script=True, **words)
    assert (done.returncode, done.stdout.split()) == (0, ["analyze"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_installed_command_gives_its_completion_script(shell):
    done = process(_PDVIT_COMPLETE=f"source_{shell}", script=True)
    assert done.returncode == 0
    assert f"_PDVIT_COMPLETE=complete_{shell}" in done.stdout
