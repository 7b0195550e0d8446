"""The command line: the commands, and errors as three lines and an exit status."""

import io
import os
import re
import sys
import traceback
from typing import Annotated

import typer

from pdvit.cli import analyze, doctor, evaluate, list_runs, plot, sweep, train
from pdvit.cli.options import WIDTH, Group, add_command
from pdvit.errors import RunFailed, UserError, closest
from pdvit.version import __version__
from pdvit.workflows.console import log

app = typer.Typer(
    name="pdvit",
    cls=Group,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)
add_command(app, "pdvit train --diversity none --cosine 1", "pdvit train --data help")(train.train)
add_command(app, "pdvit finetune runs/digits-0-4-paper", "pdvit finetune last.pth.tar --data photos/")(train.finetune)
add_command(app, "pdvit segment runs/digits-paper --head linear", "pdvit segment --data CamVid/ --crop 224")(
    train.segment
)
add_command(app, "pdvit eval runs/digits-paper", "pdvit eval a.pth --data photos/", name="eval")(evaluate.evaluate)
add_command(app, "pdvit predict runs/digits-paper photos/ --top 3 --out labels.csv")(evaluate.predict)
add_command(app, "pdvit analyze runs/digits-none runs/digits-paper", "pdvit analyze a.pth --images photos/")(
    analyze.analyze
)
add_command(app, "pdvit runs", "pdvit runs runs/comparison --json")(list_runs.runs)
add_command(app, "pdvit doctor")(doctor.doctor)
app.add_typer(plot.app, name="plot")
app.add_typer(sweep.app, name="sweep")

EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 1, 2, 130


@app.callback()
def pdvit(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """See whether a vision transformer's patches collapse into one another, and train ones whose patches don't."""
    if version:
        print(f"pdvit {__version__}")
        raise typer.Exit


def run(arguments: list[str]) -> int:
    """Run one command and return the exit status: 0 done, 1 a failed run, 2 misuse, 75 stopped on request."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for letters that the output's encoding lacks
    arguments = [*arguments, "--help"] if arguments in ([], ["plot"], ["sweep"]) else arguments
    try:
        status = app(arguments, prog_name="pdvit", standalone_mode=False)
    except (UserError, RunFailed) as error:
        return _explain(error)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        words = arguments[: 2 if arguments[0] in ("plot", "sweep") else 1]  # typer's parser has no context
        command = context.command_path if context else " ".join(["pdvit", *words])
        what, *guess = re.split(r" \(Possible options: | Did you mean ", error.format_message())
        options = re.findall(r"[\w-]+", "".join(guess))
        tip = closest(what.split()[-1], options, otherwise=f"{command} --help lists all options")
        if arguments[0] in ("resume", "replay"):  # options of `train` that people take for commands
            tip = f"it is an option: pdvit train --{arguments[0]} RUN"
        return _explain(UserError(what, command, tip))
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has ended (`pdvit analyze | head`): no more output, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if module := _failed_import(error):
            package = module.partition(".")[0]
            tip = f"install {package} again; in a new venv: pip install ."
            if package in ("torch", "torchvision"):
                tip = "install torch and torchvision that fit together; in a new venv: pip install torch torchvision ."
            return _explain(UserError(f"an import failed: {type(error).__name__}: {error}", module, tip))
        if not isinstance(error, OSError):
            raise
        where, tip = str(error.filename or "the output"), "check the name, the disk and permissions"
        return _explain(UserError(error.strerror or str(error), where, tip))
    return status if isinstance(status, int) else 0


def _failed_import(error: Exception) -> str | None:
    """Return the module whose import raised an error of any kind; None if none did, or if it is one of pdvit."""
    code = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    name = (error.name if isinstance(error, ImportError) else None) or (code and code[-1].f_globals["__name__"])
    return name if name and not name.startswith("pdvit") else None


def _explain(error: UserError | RunFailed) -> int:
    from pdvit.engine.terminal import RunConsole

    log(RunConsole(stderr=True), f"error: {error}", words=True)
    return EXIT_FAILED if isinstance(error, RunFailed) else EXIT_MISUSED
