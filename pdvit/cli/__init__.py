"""The command line: the commands, and errors as three lines and an exit status."""

import os
import sys
from typing import Annotated

import typer

from pdvit.cli import analyze, doctor, evaluate, plot, train
from pdvit.errors import RunFailed, UserError
from pdvit.version import __version__

app = typer.Typer(
    name="pdvit",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train.train)
app.command()(train.finetune)
app.command()(train.segment)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.predict)
app.command()(analyze.analyze)
app.command()(doctor.doctor)
app.add_typer(plot.app, name="plot")

EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 1, 2, 130


@app.callback()
def pdvit(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    """See whether a vision transformer's patches collapse into one another, and train ones whose patches don't."""
    if version:
        print(f"pdvit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: list[str]) -> int:
    """Run one command and return the exit status: 0 done, 1 a failed run, 2 misuse, 75 stopped on request."""
    # typer's panels take 0.1 s to import; the first screen, `pdvit --help`, is short enough without them.
    app.rich_markup_mode = "rich" if arguments and not arguments[0].startswith("-") else None
    try:
        status = app(arguments, prog_name="pdvit", standalone_mode=False)
    except UserError as error:
        return _explain(error, EXIT_MISUSED)
    except RunFailed as error:
        return _explain(error, EXIT_FAILED)
    except typer.Abort:
        return EXIT_INTERRUPTED
    except typer.TyperException as error:
        return _explain(_usage_error(error), EXIT_MISUSED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has ended (`pdvit analyze | head`): no more output, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        what = error.strerror or str(error)
        return _explain(
            UserError(what, str(error.filename or "the output"), "check the name, the disk and permissions"),
            EXIT_MISUSED,
        )
    return status if isinstance(status, int) else 0


def _explain(error: UserError | RunFailed, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


def _usage_error(error: typer.TyperException) -> UserError:
    """Return a usage error of typer as a UserError."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "pdvit"
    message = str(getattr(error, "message", error)) or type(error).__name__
    name = getattr(error, "param", None)
    if name is not None and not getattr(error, "option_name", None):
        message = f"{name.opts[-1] if name.opts else name.name}: {message}"
    guesses = getattr(error, "possibilities", None)
    tip = f"did you mean {' or '.join(sorted(guesses))}?" if guesses else f"{command} --help lists all options"
    if "Did you mean" in message:
        message, _, guess = message.partition(" Did you mean")
        tip = f"did you mean{guess}"
    return UserError(message.rstrip(), command, tip)
