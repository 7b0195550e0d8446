import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pdvit import __version__
from pdvit.cli import app
from pdvit.cli import run as pdvit
from pdvit.workflows.console import wrap
from tests.processes import EARLY

# Runs several commands in one process and prints the packages that they imported.
COMMANDS = """
import contextlib, io, sys
from pdvit.cli import run
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(command.split()) == 0, command
print(*{name.partition(".")[0] for name in sys.modules})
"""
# Runs several commands in one process, none of which can import a package, the first argument.
BROKEN = """
import sys
from pdvit.cli import run
print([run(command.split()) for command in sys.argv[2:]], sys.argv[1] in sys.modules)
"""
HEAVY = {"torch", "torchvision", "timm", "safetensors"}


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def packages(*commands: str) -> set[str]:
    done = process(sys.executable, "-c", COMMANDS, *commands)
    assert done.returncode == 0, done.stderr[-1000:]
    return set(done.stdout.split())


def test_help_imports_nothing_heavy():
    heavy = HEAVY | {"numpy", "pandas", "matplotlib", "sklearn", "rich"}
    assert not packages("--help", "train --help", "analyze --help", "plot sweep --help") & heavy


@pytest.mark.parametrize("command", ["predict", "analyze", "eval"])
def test_ctrl_c_ends_the_imports_quietly(digits_run, command):
    words = [command, str(digits_run), *(["."] if command == "predict" else [])]
    done = process(sys.executable, "-c", EARLY, str(int(signal.SIGINT)), *words)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("words", ["train --out .", "analyze runs/none", "train --resume runs/none"])
def test_a_folder_that_is_taken_or_not_there_is_refused_before_the_slow_imports(workplace, words):
    (workplace / "file").touch()
    script = f"import sys; from pdvit.cli import run; print(run({words.split()}), 'torch' in sys.modules)"
    assert process(sys.executable, "-c", script).stdout == "2 False\n"


@pytest.mark.parametrize(("package", "tip"), [("torchvision", "torch and torchvision"), ("timm", "timm again;")])
def test_a_package_that_can_not_be_imported_is_an_error_of_three_lines(workplace, package, tip):
    what = "operator torchvision::nms does not exist"
    (workplace / f"{package}.py").write_text(f"raise RuntimeError('{what}')")
    words = (package, "train", "analyze vit_tiny_patch16_224", "doctor --json")
    done = process(sys.executable, "-c", BROKEN, *words, PYTHONPATH=os.pathsep.join([str(workplace), *sys.path]))
    assert done.stdout.splitlines()[-1] == "[2, 2, 2] False"
    lines = done.stderr.splitlines()
    assert lines[:3] == [f"error: an import failed: RuntimeError: {what}", f"  where: {package}", lines[2]]
    assert f"tip:   install {tip}" in lines[2]
    assert lines == 3 * lines[:3]


def test_other_errors_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("pdvit.cli.doctor._check", lambda *_, **__: [].pop())
    with pytest.raises(IndexError):
        pdvit(["doctor"])


def test_the_end_of_a_command_does_not_search_for_cycles():
    script = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 10_000))"
    done = process(sys.executable, "-c", f"{script}\nfrom pdvit.__main__ import main; main()", "--version")
    assert done.stdout.split()[-1] == "True"


def test_letters_that_the_output_lacks_are_replaced(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert pdvit(["--version"]) == 0
    print("▁▅█ é", flush=True)
    assert stream.buffer.getvalue().decode() == f"pdvit {__version__}\n??? ?\n"


def test_a_notebooks_backend_does_not_reach_the_figures(digits_run, tmp_path):
    command = (sys.executable, "-m", "pdvit", "plot", "training", str(digits_run), "--out", str(tmp_path / "a.png"))
    done = process(*command, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert (done.returncode, done.stderr) == (0, "")


def test_lists_of_sources_and_plots_import_no_torch(workplace, digits_run, analysis_folder):
    made = analysis_folder(workplace / "made")
    plots = (f"plot maps {made} --out maps.png", f"plot training {digits_run} --out run.png")
    found = packages("train --data help", *plots)
    assert "matplotlib" in found
    assert not found & HEAVY
    assert Path("maps.png").is_file()


def test_training_and_analyzing_import_no_figures(workplace, digits_run):
    assert not packages("train --epochs 1st --out run") & {"matplotlib"}
    assert not packages(f"analyze {digits_run} --out analysis") & {"matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "what", "tip"),
    [
        *(("trian", "trian", "train"), ("plot similarity --labels", "an argument", "pdvit plot similarity --help")),
        *(("plot similarit", "similarit", "similarity"), ("train --epoch 2", "--epoch", "mean '--epochs'?")),
        ("--versoin", "--versoin", "--version"),
        *(("plot training --ouut x.png", "--ouut", "--out"), ("resume", "resume", "pdvit train --resume RUN")),
    ],
)
def test_a_mistyped_word_is_answered_with_the_right_one(refusal, arguments, what, tip):
    refusal(*arguments.split(), what=what, tip=tip)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("an", "analyze"),
        ("train --diversity p", "paper"),
        ("eval --precision b", "bf16"),
        ("finetune --opt adamw", "adamw"),
        ("plot sp", "spectrum"),
        ("predict --model deit3_small_patch16_2", "deit3_small_patch16_224"),
    ],
)
def test_the_shell_completes_words_and_only_names_of_models_import_torch(words, found):
    code = "import sys; from pdvit.__main__ import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    protocol = {"COMP_WORDS": f"pdvit {words}", "COMP_CWORD": str(len(words.split()))}
    done = process(sys.executable, "-c", code, _PDVIT_COMPLETE="complete_bash", **protocol)
    assert (done.returncode, done.stdout.split()) == (0, [found, str("--model" in words)])


MISSING = ("analyze", "eval", "predict", "finetune", "train --init", "train --resume", "train --replay")
MISSING += ("plot similarity", "plot maps", "plot training")


@pytest.mark.parametrize("command", MISSING)
def test_a_run_that_does_not_exist_is_answered_with_those_that_do_or_how_to_make_one(
    digits_run, workplace, refusal, command
):
    words = [*command.split(), "runs/digits", *(["."] if command == "predict" else [])]
    found = refusal(*words)
    assert "there is no such" in found.what
    assert found.where == "runs/digits"
    assert found.tip.endswith("runs/ has none yet; train one: pdvit train")
    for name in ("others", "digits-none"):
        (workplace / "runs").mkdir(exist_ok=True)
        (workplace / "runs" / name).symlink_to(digits_run)
    assert refusal(*words).tip.endswith("did you mean 'runs/digits-none'?")


def test_help_fits_eighty_columns_and_shows_no_type_of_a_switch(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands = typer.main.get_command(app).commands
    for words in ([], ["--help"], ["plot"]):
        assert pdvit(words) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        for name, command in (commands if words != ["plot"] else commands["plot"].commands).items():
            first = " ".join(command.help.split("\n\n")[0].split())
            assert any(re.fullmatch(rf"{name} +{re.escape(first)}", line) for line in lines), name
    for name in commands:
        assert pdvit([name, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert not any("bool" in line for line in lines)


def test_an_error_breaks_between_words_and_its_command_stays_whole():
    command = "pdvit train --resume runs/a --change data.micro_batch=16"
    lines = wrap(f"  tip:   images of this size need less memory, so resume in parts: {command}", 60)
    assert [line.strip() for line in lines] == [
        "tip:   images of this size need less memory, so resume in",
        "parts:",
        command,
    ]
    assert wrap("error: short", 60) == ["error: short"]
