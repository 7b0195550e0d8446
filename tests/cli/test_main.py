import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdvit import __version__
from pdvit.cli import run as pdvit

HEAVY = ("torch", "torchvision", "timm", "pandas", "matplotlib", "sklearn", "safetensors")
COMMANDS = [[], ["train"], ["analyze"], ["plot", "sweep"]]


def process(*arguments: str, script: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python, or the installed `pdvit`, with the arguments."""
    program = Path(sys.executable).with_name("pdvit") if script else sys.executable
    command = [str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )


def packages(importtime: str) -> set[str]:
    """Return the top-level packages in the output of `python -X importtime`."""
    names = re.findall(r"^import time: .*\| +(\S+)$", importtime, re.MULTILINE)
    assert "pdvit.cli" in names
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_printed_and_imports_nothing_heavy(command):
    done = process("-X", "importtime", "-m", "pdvit", *command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert command or all(re.search(rf"\b{name}\b", done.stdout) for name in ("train", "analyze", "doctor", "plot"))
    assert not packages(done.stderr) & {*HEAVY, "rich.console"}


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


@pytest.mark.parametrize("figure", ["maps", "training"])
def test_plotting_imports_no_torch(workplace, digits_run, analysis_folder, figure):
    run = digits_run if figure == "training" else analysis_folder(workplace / "made")
    done = process("-X", "importtime", "-m", "pdvit", "plot", figure, str(run), "--out", "figure.png")
    assert done.returncode == 0, done.stderr[-1000:]
    assert "matplotlib" in packages(done.stderr)
    assert not packages(done.stderr) & {"torch", "torchvision", "timm", "safetensors"}
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
