"""The options that all commands that train have, beside the settings, and what they mean together."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.replay import replay as run_replay
from pdvit.cli.runs.resume import resume as run_resume
from pdvit.cli.runs.start import start
from pdvit.cli.runs.sweep import run_sweep
from pdvit.cli.runs.together import together
from pdvit.cli.settings import Layer, given_flags, make_layers
from pdvit.config.load import SWEEP_SECTION, build
from pdvit.errors import UserError

File = Annotated[Path | None, typer.Option("--config", "-c", help="A TOML file with any keys.")]
Assign = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; wins over everything; repeatable.")]
Cells = Annotated[
    str | None,
    typer.Option("--cells", help="Of a sweep: run only these cells, 3-7 or 1,4,9-; list shows them all."),
]
Resume = Annotated[
    str | None, typer.Option("--resume", help="Go on with this run directory, as it was configured; auto: the newest.")
]
Change = Annotated[
    list[str] | None,
    typer.Option("--change", help="section.key=value: go on with another setting; with --resume; repeatable."),
]
Replay = Annotated[
    Path | None, typer.Option("--replay", help="Run the step again at which this run broke down, and say where.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON and nothing else.")]


def initial_weights(checkpoint: str | None, settings: dict[str, Any]) -> None:
    """Take the checkpoint that is a command's argument for `--init`; UserError where both are given."""
    if checkpoint is not None and settings["model_init"] is not None:
        raise UserError("there are two checkpoints to begin with", "CKPT, --init", "give one of them")
    settings["model_init"] = checkpoint if checkpoint is not None else settings["model_init"]


def begin(
    command: Command,
    config: Path | None,
    assign: list[str] | None,
    cells: str | None,
    resume: str | None,
    change: list[str] | None,
    replay: Path | None,
    as_json: bool,
    settings: dict[str, Any],
    defaults: Layer | None = None,
) -> int:
    """Start, resume or replay a run, or run a sweep, as the options say.

    Returns the exit status, and raises UserError and RunFailed.
    """
    from pdvit.engine.interrupts import stop_on_signals

    if resume is not None and replay is not None:
        raise UserError("a run is either resumed or replayed", "--resume, --replay", "give one of them")
    again = f"--resume {resume}" if resume is not None else f"--replay {replay}" if replay is not None else None
    given = given_flags(settings) + (["--set"] if assign else []) + (["--config"] if config else [])
    given += ["--cells"] if cells is not None else []
    if again is not None and given:
        raise UserError(
            f"a run that is taken up keeps its configuration, so {given[0]} can't be given",
            again,
            "leave it out, change a setting with --change section.key=value, or start a new run",
        )
    if change and resume is None:
        raise UserError("only a run that is resumed can be changed", "--change", "add --resume RUN")
    with stop_on_signals() as stop, together():  # before anything slow is imported
        if replay is not None:
            return run_replay(command, replay, as_json)
        if resume is not None:
            return run_resume(command, resume, change or [], as_json, stop)
        layers = make_layers(config, assign or [], settings, defaults=defaults)
        if config is not None and SWEEP_SECTION in dict(layers)[str(config)]:
            return run_sweep(command, config, layers, cells, as_json, stop)
        asked = build(*layers)
        if cells is not None:
            raise UserError("only a sweep has cells", "--cells", "name a --config with a [sweep] table: docs/sweep.md")
        command.check(asked)
        return start(command, asked, as_json, stop)
