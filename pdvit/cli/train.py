"""`pdvit train`, `pdvit finetune` and `pdvit segment`: one command with three sets of defaults."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.options import check_initial_weights, make_layers, training_command
from pdvit.cli.sweep import run_sweep
from pdvit.config.load import SWEEP_SECTION, build, read_toml
from pdvit.config.recipes import DEFAULTS, recipe_defaults
from pdvit.config.resolve import resolve
from pdvit.config.schema import KEYS, Config
from pdvit.data.sources import list_source_types
from pdvit.errors import RunFailed, UserError
from pdvit.tracking.run_directory import STATUS, RunDirectory, find_run, refuse_taken
from pdvit.workflows.console import log, make_console, process_group

if TYPE_CHECKING:
    from pdvit.engine.terminal import RunConsole, StopRequest
    from pdvit.launch import Jobs

Checkpoint = Annotated[
    str | None,
    typer.Argument(metavar="CKPT", help="Run directory, timm folder, weight file, or model of timm's hub."),
]
# Flags of [launch] by launcher; slurm uses all. Keys of a file are not checked, so that it serves every launcher.
USED_BY: dict[str, Sequence[str]] = {"none": ("--launcher",)}
USED_BY["local"] = ("--launcher", "--gpus", "--cpus", "--parallel", "--follow")
RUN = "run"  # name of the job of a single run


def launch(
    command: str,
    checkpoint: str | None = None,
    *,
    file: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file with any settings.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set section.key=value; repeatable.")
    ] = None,
    cells: Annotated[str | None, typer.Option("--cells", help="Cells of a sweep: 3-7 or 1,4,9-; failed; list.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="Resume this run as saved; auto: the newest.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--change", metavar="KEY=VALUE", help="Resume with section.key=value.")
    ] = None,
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
    existing = resume if replay is None else replay
    given = [key for key in KEYS.values() if values.get(f"{key.section}_{key.name}") not in (None, [])]
    if existing is not None:
        flags = [key.flags[0] for key in given if replay is not None or key.section != "launch"]
        flags += [flag for flag, used in (("--set", assign), ("--config", file), ("--cells", cells)) if used]
        if flags:
            tip = "leave it out, change a setting with --change section.key=value, or start a new run"
            where = f"--resume {resume}" if replay is None else f"--replay {replay}"
            raise UserError(f"a run keeps its saved configuration, so {flags[0]} can't be given", where, tip)
    if change and resume is None:
        raise UserError("only a resumed run can be changed", "--change", "add --resume RUN")
    with stop_on_signals() as stop, process_group():  # before the slow imports
        console = make_console(as_json)
        run = None if existing is None else find_run(existing)
        recipe = {} if file is None else read_toml(file)
        table = recipe.pop(SWEEP_SECTION, None)
        layers = [("the command's defaults", DEFAULTS[command]), (str(file), recipe)]
        layers += make_layers(values, assign or [])
        if command == "segment":
            layers[0] = (layers[0][0], recipe_defaults(build(*layers)))
        config = build(*layers)  # of a resumed run, only [launch] matters
        if table is not None and config.launch.launcher == "none":  # cells are jobs
            config = replace(config, launch=replace(config.launch, launcher="local"))
        launcher = config.launch.launcher
        asked = [KEYS[f"launch.{name}"].flags[0] for _, layer in layers[2:] for name in layer.get("launch", {})]
        asked += ["--follow"] if follow else []
        if unused := [flag for flag in asked if flag not in USED_BY.get(launcher, asked)]:
            tip = f"add --launcher {'local or slurm' if unused[0] in USED_BY['local'] else 'slurm'}, or leave it out"
            raise UserError(f"{unused[0]} has no effect with --launcher {launcher}", unused[0], tip)
        if table is not None:
            return run_sweep(command, layers, table, config, cells, follow, console, stop)
        if run is None:
            if cells is not None:
                tip = "name a --config with a [sweep] table: docs/sweep.md"
                raise UserError("only a sweep has cells", "--cells", tip)
            if command == "finetune":
                check_initial_weights(config)
            if config.data.source == "help":
                print(list_source_types())
                return 0
            refuse_taken(config.run.out)
        log(console, f"opening {run or config.data.source} ...")  # imports, many files and weights can take minutes
        if launcher != "none" and replay is None:
            return _launch_run(config, run, change or [], follow, console, stop)
        from pdvit.workflows import runs

        prepare: Any = partial(runs.start, config)
        if run is not None:
            prepare = partial(runs.resume, run, change or []) if replay is None else partial(runs.replay, run)
        return runs.train_to_end(prepare, console, stop)


def _launch_run(
    config: Config, run: Path | None, change: list[str], follow: bool, console: "RunConsole", stop: "StopRequest"
) -> int:
    """Submit a job for a new run or the existing `run`; return the exit status."""
    from pdvit.launch import Jobs, RunJob, end_of_job
    from pdvit.workflows import runs

    if run is not None:
        path, config = run, replace(runs.saved_config(run, change), launch=config.launch)
    else:
        if config.data.batch_size:
            resolve(config)  # raises the errors of settings before the job
        unnamed = config.run.name is None and config.run.out is None
        base = runs.default_name(config) if unnamed else config.run.name or ""
        path = RunDirectory.create(config.run.out, base).path
    jobs = Jobs(path)
    with jobs.locked():
        if jobs.states():
            launcher, id_, _ = jobs.ids()[RUN]
            tip = f"wait for it, or cancel it: {end_of_job(launcher, id_)}"
            raise UserError(f"job {id_} of this run has not ended", str(path), tip)
        job = RunJob(config, path.resolve(), (*change,))
        try:
            jobs.start(config.launch, {RUN: job}, [os.environ.get("CUDA_VISIBLE_DEVICES")])
        except UserError:
            if run is None and not jobs.ids():
                shutil.rmtree(jobs.folder)
                with suppress(OSError):  # a folder that was there before can have hidden files
                    path.rmdir()
            raise
    launcher, id_, _ = jobs.ids()[RUN]
    if console.stderr:
        print(json.dumps({"run": str(path), "launcher": launcher, "job": id_, "log": str(jobs.log(RUN))}, indent=2))
    log(console, f"job            {launcher} {id_}\nlog            {jobs.log(RUN)}\nrun directory  {path}")
    log(console, f"save and end   {end_of_job(launcher, id_)}")
    return _follow(jobs, path, console, stop) if follow else 0


def _follow(jobs: "Jobs", run: Path, console: "RunConsole", stop: "StopRequest") -> int:
    """Print the output of a job until it ends; return the exit status of its run. A signal leaves the job alone."""
    from pdvit.engine.terminal import EXIT_STOPPED
    from pdvit.launch import POLL_SECONDS

    file, seconds = jobs.log(RUN), POLL_SECONDS[jobs.ids()[RUN][0]]
    out = 2 if console.stderr else None
    with subprocess.Popen(["tail", "-n", "+1", "-F", file], stdout=out, stderr=subprocess.DEVNULL) as tail:
        try:
            while RUN in jobs.states() and not stop:
                time.sleep(seconds)
            time.sleep(1)  # it looks once a second
        finally:
            tail.terminate()
    if stop:
        log(console, f"the job continues; its log: {file}")
        return EXIT_STOPPED
    if not file.is_file():
        tip = "the machines of Slurm may not see it: choose an --out on a disk that all share"
        raise RunFailed(f"the job ended without output in {file.parent}", tip)
    status = RunDirectory(run).read_json(STATUS, optional=True).get("status", "")
    return {"finished": 0, "stopped": EXIT_STOPPED}.get(status, 1)


@partial(training_command, launch=launch)
def train(**values: Any) -> int:
    """Train a vision transformer with the diversity terms.

    Without arguments: a small one on scikit-learn's digits, with all three terms, in a little over a minute.
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
