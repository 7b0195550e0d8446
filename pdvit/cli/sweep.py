"""A sweep: check its cells, run them, and print their outcomes."""

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.options import Group, add_command, check_initial_weights
from pdvit.config.duration import describe_duration, parse_duration
from pdvit.config.recipes import NamedLayer, merge_layers
from pdvit.config.schema import Config, LaunchConfig
from pdvit.errors import UserError, adding, command
from pdvit.tasks import describe_summary
from pdvit.tracking.run_directory import RUNS, RunDirectory
from pdvit.workflows.console import count, log, make_console

if TYPE_CHECKING:
    from pdvit.engine.terminal import RunConsole, StopRequest
    from pdvit.launch import Jobs, RunJob
    from pdvit.sweep import Cell, Folder

CANCELLED = "cancelled"  # a file in the folder of the jobs, for the command that runs the sweep
OF_THE_SWEEP = ("out", "name", "time_limit")  # keys of the whole sweep, not of its cells
MAX_FAILURES = 10


def run_sweep(
    name: str,
    layers: list[NamedLayer],
    table: dict[str, Any],
    config: Config,
    chosen: str | None,
    follow: bool,
    console: "RunConsole",
    stop: "StopRequest",
) -> int:
    """Run the cells of a [sweep] `table` that are not finished, or those of --cells; return the exit status.

    `layers` are the command's defaults, the file, flags and --set, and `config` is built of them.
    """
    from pdvit.engine.terminal import EXIT_STOPPED
    from pdvit.launch import Jobs, RunJob
    from pdvit.sweep import Folder, make_cells, numbers

    if os.environ.get("WORLD_SIZE", "1") != "1":
        tip = "start it without torchrun: each cell gets its own device"
        raise UserError("a sweep can't run in several processes", "the environment", tip)
    settings = merge_layers(layer for _, layer in layers)
    settings["run"] = {key: value for key, value in settings.get("run", {}).items() if key not in OF_THE_SWEEP}
    settings.pop("launch", None)
    file = layers[1][0]
    cells = make_cells(settings, table, file)
    _check_not_swept(table, layers[2:])
    for cell in cells if name == "finetune" else ():
        with adding(f", cell {cell.number} ({cell.name})"):
            check_initial_weights(cell.config)
    out, local = config.run.out, config.launch.launcher == "local"
    folder = Folder(Path(os.path.expanduser(out)) if out is not None else RUNS / (config.run.name or Path(file).stem))
    jobs = Jobs(folder.path)
    if chosen == "list":
        return _list(folder, cells, jobs, console)
    failed = chosen == "failed"
    named = numbers("1-" if chosen is None or failed else chosen, len(cells))
    folder.begin(settings, table, cells)
    with jobs.locked():
        (jobs.folder / CANCELLED).unlink(missing_ok=True)
        live = jobs.states()
        states = {cell.name: state.status for cell, state in folder.write_table(live)}
        selected = [cell for cell in cells if cell.number in named and (not failed or states[cell.name] == "failed")]
        to_run = ("failed",) if failed else ("waiting", "stopped")
        todo = [cell for cell in selected if states[cell.name] in to_run and cell.name not in live]
        log(console, f"{count(len(cells), 'cell')} in {folder.path}, {len(todo)} to run now")
        configs = {cell.name: replace(cell.config, launch=config.launch) for cell in todo}
        waiting = {name: RunJob(found, (folder.path / name).resolve()) for name, found in configs.items()}
        if local and (todo or live):
            log(console, "checking their configurations ...")
            devices = devices_of(todo, _check(folder, todo), config.launch)
            _watch(folder, jobs, cells, config, console, stop, waiting, devices)
        elif todo:
            jobs.start(config.launch, waiting)
            log(console, f"submitted; logs in {jobs.folder}")
    if not local:
        if follow:
            _watch(folder, jobs, cells, config, console, stop)
        log(console, f"follow with  {command('sweep', 'status', folder.path)}")
        log(console, f"cancel with  {command('sweep', 'cancel', folder.path)}")
    if console.stderr:
        _list(folder, selected, jobs, console)
    if not local and (stop or not follow):
        return EXIT_STOPPED if stop else 0
    return _print_outcomes(folder, jobs, selected, console)


def _watch(
    folder: "Folder",
    jobs: "Jobs",
    cells: Sequence["Cell"],
    config: Config,
    console: "RunConsole",
    stop: "StopRequest",
    waiting: dict[str, "RunJob"] | None = None,
    devices: Sequence[str | None] = (),
) -> None:
    """Log the cells as their jobs end; with `devices`, start those that wait here, and end all at a stop."""
    from pdvit.launch import POLL_SECONDS

    waiting, begun, durations = waiting or {}, time.monotonic(), list[float]()
    limit = config.run.time_limit
    seconds = parse_duration(limit, "min", "run.time_limit").seconds if limit else None
    lines = {cell.name: f"cell {cell.number} of {len(cells)}: {cell.name}" for cell in cells}
    running = {name: begun for name in jobs.states() if name in lines}  # also by a command that was killed
    try:
        while running or (waiting and not stop):
            over = seconds is not None and time.monotonic() - begun >= seconds
            if devices and (over or (jobs.folder / CANCELLED).is_file()):
                stop.reason = stop.reason or "cancelled, or the time limit"
            started = jobs.start(config.launch, waiting, devices) if waiting and not stop else []
            for name in started:
                running[name] = time.monotonic()
                log(console, f"{lines[name]} ...")
            states = jobs.states()
            ended = [name for name in running if name not in states]
            for name in ended:
                took, run = time.monotonic() - running.pop(name), RunDirectory(folder.path / name)
                state = folder.state(name, states)
                killed = state.status != "running" and folder.written(name).status in ("running", "waiting")
                if devices and killed and not stop:
                    run.mark("failed", f"its process ended; its output is in {jobs.log(name)}")
                    state = folder.written(name)
                line = f"{lines[name]}: {state.status}{': ' if state.reason else ''}{state.reason}"
                if state.status == "finished":
                    durations.append(took)
                    metrics, similarity, *_ = describe_summary(run.read_json("summary.json")).splitlines()
                    line += f" in {describe_duration(took)}; {metrics}; {similarity}"
                if durations and (left := len(running) + len(waiting)):
                    rest = statistics.mean(durations) * left / max(1, len(devices) or len(running))
                    line += f"; about {describe_duration(rest)} left"
                log(console, line, words=True)
            if started or ended:
                folder.write_table(states)
            if stop and not devices:
                return
            if stop:  # each run finishes its step and saves; a job that just began may have missed a signal
                jobs.cancel()
            time.sleep(POLL_SECONDS[config.launch.launcher])
    finally:
        if devices:
            jobs.cancel()


def _print_outcomes(folder: "Folder", jobs: "Jobs", cells: Sequence["Cell"], console: "RunConsole") -> int:
    from pdvit.engine.terminal import EXIT_STOPPED

    names = {cell.name for cell in cells}
    states = {cell.name: state for cell, state in folder.write_table(jobs.states()) if cell.name in names}
    counts = Counter(state.status for state in states.values())
    parts = ", ".join(f"{number} {status}" for status, number in counts.items()) or "none failed"
    log(console, f"\n{count(len(states), 'cell')}: {parts}\ntable     {folder.path}/cells.csv")
    failed = [f"  {name}: {state.reason}" for name, state in states.items() if state.status == "failed"]
    for line in failed[:MAX_FAILURES]:
        log(console, line, words=True)
    if failed:
        more = f"and {len(failed) - MAX_FAILURES} more; " if len(failed) > MAX_FAILURES else ""
        log(console, f"{more}logs in {jobs.folder}; to run them again: --cells failed")
    if counts["stopped"] or counts["waiting"] or counts["running"]:
        log(console, "the same command resumes the sweep")
        return EXIT_STOPPED
    if counts["finished"]:
        log(console, f"next      {command('plot', 'sweep', folder.path)}", "accent", words=True)
    return 1 if failed else 0


def _check(folder: "Folder", cells: Sequence["Cell"]) -> list[str]:
    """Build the trainer of every new configuration, once for all seeds; raises UserError; returns the visible GPUs.

    On the CPU, so that this process holds no memory of a GPU while the cells run.
    """
    from pdvit.engine.device import visible_gpus
    from pdvit.engine.terminal import RunConsole
    from pdvit.workflows.runs import build_trainer

    checked = list[Config]()
    for cell in cells:
        data = replace(cell.config.data, batch_size=cell.config.data.batch_size or 1)  # auto is found in the job
        run = replace(cell.config.run, seed=0, device="cpu", distribute="ddp", deterministic=False)
        config = replace(cell.config, data=data, run=run)
        if config not in checked and not (folder.path / cell.name / "run.toml").is_file():
            checked.append(config)
            with adding(f", cell {cell.number} ({cell.name})"):
                build_trainer(config, RunConsole(quiet=True), load=False)
    return visible_gpus()


def devices_of(cells: Sequence["Cell"], gpus: Sequence[str], launch: LaunchConfig) -> list[str | None]:
    """Return the CUDA_VISIBLE_DEVICES of jobs that run at the same time: --gpus for each, unless a cell names one."""
    devices, each = [os.environ.get("CUDA_VISIBLE_DEVICES")], launch.gpus or 1
    if len(gpus) > 1 and all(cell.config.run.device in ("auto", "cuda") for cell in cells):
        devices = [",".join(gpus[first : first + each]) for first in range(0, len(gpus) - each + 1, each)] or devices
    return [devices[number % len(devices)] for number in range(launch.parallel or len(devices))]


def _check_not_swept(table: Mapping[str, Any], layers: Sequence[NamedLayer]) -> None:
    swept = {*table, *(key for variant in table.get("variant", []) for key in variant)}
    for name, layer in layers:
        for key in (f"{section}.{key}" for section, values in layer.items() for key in values):
            if key in swept:
                raise UserError(f"the sweep sets {key}, so it can't be given", name, "leave it out, or choose --cells")


def _list(folder: "Folder", cells: Sequence["Cell"], jobs: "Jobs", console: "RunConsole") -> int:
    live, ids = jobs.states(), jobs.ids()
    listed = [{"cell": cell.number, "name": cell.name} | vars(folder.state(cell.name, live)) for cell in cells]
    listed = [row | ({"job": ids[row["name"]][1]} if row["name"] in live else {}) for row in listed]
    if console.stderr:
        print(json.dumps({"sweep": str(folder.path), "cells": listed}, indent=2))
        return 0
    print(f"{count(len(cells), 'cell')} in {folder.path}")
    width = max((len(cell.name) for cell in cells), default=0)
    for row in listed:
        job = f"job {row['job']}" if "job" in row else row["reason"]
        print(f"{row['cell']:>5}  {row['name']:{width}}  {row['status']:8}  {job}".rstrip())
    return 0


Place = Annotated[Path, typer.Argument(metavar="SWEEP", help="Folder of a sweep.")]
app = typer.Typer(cls=Group, help="Look after the jobs of a sweep.")


@add_command(app, "pdvit sweep status runs/comparison")
def status(sweep: Place, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Print the state of each cell, and write cells.csv anew."""
    from pdvit.launch import Jobs
    from pdvit.sweep import Folder

    folder, jobs = Folder(sweep), Jobs(sweep)
    cells = [cell for cell, _ in folder.write_table(jobs.states())]
    return _list(folder, cells, jobs, make_console(as_json))


@add_command(app, "pdvit sweep cancel runs/comparison")
def cancel(sweep: Place) -> None:
    """End the jobs of a sweep; their runs save first, and the sweep can be resumed."""
    from pdvit.launch import Jobs
    from pdvit.sweep import Folder

    Folder(sweep).read_cells()
    jobs = Jobs(sweep)
    if jobs.folder.is_dir():
        (jobs.folder / CANCELLED).touch()
    print(f"cancelled: {count(len(jobs.cancel()), 'job')}")
