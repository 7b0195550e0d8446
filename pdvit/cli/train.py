"""`pdvit train`, `pdvit finetune` and `pdvit segment`: one command with three sets of defaults."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pdvit.cli.launch import launch_run
from pdvit.cli.options import check_initial_weights, make_layers, training_command
from pdvit.cli.sweep import run_sweep
from pdvit.config.load import SWEEP_SECTION, build
from pdvit.config.recipes import DEFAULTS, recipe_defaults
from pdvit.config.schema import KEYS, SECTIONS
from pdvit.data.sources import list_source_types
from pdvit.errors import UserError
from pdvit.tracking.run_directory import refuse_taken
from pdvit.workflows.console import log, make_console, process_group

Checkpoint = Annotated[
    str | None, typer.Argument(metavar="CKPT", help="Run directory, timm folder, weight file, or model of timm's hub.")
]


def launch(
    command: str,
    checkpoint: str | None = None,
    *,
    file: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file with any settings.")] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="Set section.key=value; repeatable.")] = None,
    cells: Annotated[str | None, typer.Option("--cells", help="Cells of a sweep: 3-7 or 1,4,9-; failed; list.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="Resume this run as saved; auto: the newest.")] = None,
    change: Annotated[list[str] | None, typer.Option("--change", help="Resume with section.key=value.")] = None,
    replay: Annotated[Path | None, typer.Option("--replay", help="Repeat the non-finite step of this run.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show a job's output until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the summary, as JSON.")] = False,
    **values: Any,
) -> int:
    """Start, resume or replay a run, or run a sweep; return the exit status. `values` has the flags `section_key`."""
    from pdvit.engine.terminal import stop_on_signals

    if checkpoint is not None:
        if values["model_init"] is not None:
            raise UserError("two checkpoints to start from", "CKPT, --init", "give one of them")
        values["model_init"] = checkpoint
    if resume is not None and replay is not None:
        raise UserError("a run is either resumed or replayed", "--resume, --replay", "give one of them")
    settings = [key for key in KEYS.values() if values.get(f"{key.section}_{key.name}") not in (None, [])]
    of_jobs = [key.flags[0] for key in settings if key.section == "launch" and key.name != "launcher"]
    of_jobs += ["--follow"] if follow else []
    if resume is not None or replay is not None:
        flags = [key.flags[0] for key in settings if replay is not None or key.section != "launch"]
        flags += [flag for flag, given in (("--set", assign), ("--config", file), ("--cells", cells)) if given]
        if flags:
            tip = "leave it out, change a setting with --change section.key=value, or start a new run"
            where = f"--resume {resume}" if replay is None else f"--replay {replay}"
            raise UserError(f"a run keeps its saved configuration, so {flags[0]} can't be given", where, tip)
    if change and resume is None:
        raise UserError("only a resumed run can be changed", "--change", "add --resume RUN")
    with stop_on_signals() as stop, process_group():  # before the slow imports
        console = make_console(as_json)
        opened = resume if replay is None else replay
        layers = make_layers(file, assign or [], values, DEFAULTS[command])
        if command == "segment":
            sections = ((name, {key: layer[key] for key in layer if key in SECTIONS}) for name, layer in layers)
            layers[0] = (layers[0][0], recipe_defaults(build(*sections)))
        if file is not None and SWEEP_SECTION in dict(layers)[str(file)]:
            return run_sweep(command, file, layers, cells, follow, console, stop)
        config = build(*layers)  # of a resumed run, only [launch] matters
        launched = config.launch.launcher != "none"
        if of_jobs and not launched:
            what = f"{of_jobs[0]} is for jobs, and the run is trained in this command"
            raise UserError(what, of_jobs[0], "add --launcher local or slurm, or leave it out")
        if opened is None:
            if cells is not None:
                tip = "name a --config with a [sweep] table: docs/sweep.md"
                raise UserError("only a sweep has cells", "--cells", tip)
            if command == "finetune":
                check_initial_weights(config)
            if config.data.source == "help":
                print(list_source_types())
                return 0
            refuse_taken(config.run.out)
            opened = config.data.source
        log(console, f"opening {opened} ...")  # imports, many files and weights can take minutes
        if launched and replay is None:
            return launch_run(config, resume, change or [], follow, console, stop)
        from pdvit.workflows import runs

        if replay is not None:
            return runs.train_to_end(partial(runs.replay, replay), console, stop)
        prepare = partial(runs.start, config) if resume is None else partial(runs.resume, resume, change or [])
        return runs.train_to_end(prepare, console, stop)


@partial(training_command, launch=launch)
def train(**values: Any) -> int:
    """Train a vision transformer with the diversity terms.

    Without arguments: a small one on scikit-learn's handwritten digits, with all three terms, in about two minutes.
    """
    return launch("train", **values)


@partial(training_command, launch=launch, defaults=DEFAULTS["finetune"])
def finetune(checkpoint: Checkpoint = None, **values: Any) -> int:
    """Finetune a checkpoint: on other classes, images or resolutions.

    Without --data: on the digits 5 to 9, for a model that learned 0 to 4 (pdvit train --data digits:0-4).
    """
    return launch("finetune", checkpoint, **values)


@partial(training_command, launch=launch, defaults=DEFAULTS["segment"])
def segment(checkpoint: Checkpoint = None, **values: Any) -> int:
    """Train a vision transformer that labels every pixel.

    CKPT is its backbone. Without arguments: a small one on scenes of handwritten digits, in a few minutes.
    """
    return launch("segment", checkpoint, **values)
