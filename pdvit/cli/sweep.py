"""A sweep: check its cells, run them, and print their outcomes."""

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pdvit.cli.options import check_initial_weights
from pdvit.config.duration import parse_duration
from pdvit.config.load import build, to_dict
from pdvit.config.recipes import NamedLayer, merge_layers
from pdvit.config.schema import Config
from pdvit.errors import UserError
from pdvit.tasks.summary import describe_summary
from pdvit.workflows.console import duration, log, make_console

if TYPE_CHECKING:
    from pdvit.engine.terminal import RunConsole, StopRequest
    from pdvit.sweep import Cell, Folder

PRELOADED = ["pdvit.workflows.runs", "pdvit.tasks.classification", "pdvit.tasks.segmentation"]  # once for all cells
PRELOADED += ["sklearn.datasets", "sklearn.model_selection"]
OF_THE_SWEEP = ("out", "name", "time_limit")  # keys of the whole sweep, not of its cells
MAX_FAILURES = 10


def run_sweep(
    command: str, file: Path, layers: list[NamedLayer], chosen: str | None, console: "RunConsole", stop: "StopRequest"
) -> int:
    """Run the cells of the [sweep] in `file` that are not finished, or those of --cells; return the exit status."""
    from pdvit.sweep import Folder, make_cells, numbers, split
    from pdvit.tracking.run_directory import RUNS

    if os.environ.get("WORLD_SIZE", "1") != "1":
        tip = "start it without torchrun: each cell gets its own device"
        raise UserError("a sweep can't run in several processes", "the environment", tip)
    where = str(file)
    base, table = split(dict(layers)[where], where)
    assert table is not None, "only files with a [sweep] table come here"
    merged = [(name, base if name == where else layer) for name, layer in layers]
    config = build(*merged)
    settings = merge_layers(layer for _, layer in merged)
    settings["run"] = {key: value for key, value in settings.get("run", {}).items() if key not in OF_THE_SWEEP}
    cells = make_cells(settings, table, where)
    _check_not_swept(table, merged[merged.index((where, base)) + 1 :])
    for cell in cells if command == "finetune" else ():
        with _naming(cell):
            check_initial_weights(cell.config)
    out = config.run.out
    folder = Folder(Path(os.path.expanduser(out)) if out is not None else RUNS / (config.run.name or file.stem))
    if chosen == "list":
        return _list(folder, cells, console)
    states = {cell.name: folder.written(cell.name).status for cell in cells}
    if chosen == "failed":
        selected = todo = [cell for cell in cells if states[cell.name] == "failed"]
    else:
        named = set(range(1, len(cells) + 1)) if chosen is None else numbers(chosen, len(cells))
        selected = [cell for cell in cells if cell.number in named]
        todo = [cell for cell in selected if states[cell.name] not in ("finished", "failed")]
    folder.begin(settings, table, cells)
    folder.write_table()
    log(console, f"{len(cells)} cells in {folder.path}, {len(todo)} of them to run now")
    if todo:
        limit = config.run.time_limit
        seconds = None if limit is None else parse_duration(limit, "min", "run.time_limit").seconds
        _train_cells(folder, todo, len(cells), seconds, console, stop)
    return _print_outcomes(folder, selected, console)


def _train_cells(
    folder: "Folder",
    cells: Sequence["Cell"],
    total: int,
    limit: float | None,
    console: "RunConsole",
    stop: "StopRequest",
) -> None:
    """Check the cells and train them, for at most `limit` seconds."""
    from pdvit.sweep import run_apart, run_cells

    set_forkserver_preload(PRELOADED)
    log(console, "checking their configurations ...")
    new = [cell for cell in cells if not (folder.path / cell.name / "run.toml").is_file()]
    devices = devices_of(cells, run_apart(_check, folder.log("check"), stop, new) or [])
    left, running, durations = len(cells), set[str](), list[float]()
    with closing(run_cells(folder, cells, train_cell, devices, stop, limit)) as events:
        for cell, state, seconds in events:
            running ^= {cell.name}
            folder.write_table(running)
            line = f"cell {cell.number} of {total}: {cell.name}"
            if cell.name in running:
                log(console, f"{line} ...")
                continue
            left -= 1
            if state.status == "finished":
                durations += [seconds] if seconds else []
                summary = json.loads((folder.path / cell.name / "summary.json").read_text(encoding="utf-8"))
                time = f"in {duration(seconds)}" if seconds else "by another process"
                line += f": finished {time}; {describe_summary(summary).splitlines()[0]}"
            elif state.status == "running":
                line += ": another process trains it"
            else:
                line += f": {state.status}{': ' if state.reason else ''}{state.reason}"
            if left > 0 and durations:
                line += f"; about {duration(statistics.mean(durations) * left / len(devices))} left"
            log(console, line)


def _print_outcomes(folder: "Folder", cells: Sequence["Cell"], console: "RunConsole") -> int:
    from pdvit.engine.terminal import EXIT_STOPPED
    from pdvit.sweep.folder import CellStatus

    states = {cell.name: state for cell, state in folder.write_table()}
    states = {cell.name: states[cell.name] for cell in cells}
    counts = Counter(state.status for state in states.values())
    if console.stderr:
        statuses = {status: counts[status] for status in get_args(CellStatus)}
        print(json.dumps({"sweep": str(folder.path), "cells": len(states)} | statuses, indent=2))
    parts = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none failed"
    log(console, f"\n{len(states)} cells: {parts}\ntable     {folder.path}/cells.csv")
    failed = [f"  {name}: {state.reason}" for name, state in states.items() if state.status == "failed"]
    for line in failed[:MAX_FAILURES]:
        log(console, line)
    if failed:
        more = f"and {len(failed) - MAX_FAILURES} more; " if len(failed) > MAX_FAILURES else ""
        log(console, f"{more}logs in {folder.path}/logs; to run them again: --cells failed")
    if counts["stopped"] or counts["waiting"] or counts["running"]:
        log(console, "the same command resumes the sweep")
        return EXIT_STOPPED
    return 1 if failed else 0


def train_cell(config: Config, run: Path) -> int:
    """Start or resume the run of a cell; return the exit status, and raise UserError and RunFailed."""
    from pdvit.engine.terminal import stop_on_signals
    from pdvit.workflows.runs import resume, start, train_to_end

    console = make_console(as_json=False)
    with stop_on_signals() as stop:
        new = partial(start, replace(config, run=replace(config.run, out=str(run))))
        prepare = partial(resume, str(run), []) if (run / "run.toml").is_file() else new
        return train_to_end(prepare, console, stop)


def _check(cells: Sequence["Cell"]) -> list[str]:
    """Build the trainer of every configuration, once for all seeds; raises UserError; returns the visible GPUs."""
    from pdvit.engine.device import visible_gpus
    from pdvit.workflows.runs import build_trainer

    checked: list[dict[str, Any]] = []
    for cell in cells:
        settings = to_dict(replace(cell.config, run=replace(cell.config.run, seed=0)))
        if settings not in checked:
            checked.append(settings)
            with _naming(cell):
                build_trainer(cell.config, make_console(as_json=False), load=False)
    return visible_gpus()


def devices_of(cells: Sequence["Cell"], gpus: Sequence[str]) -> Sequence[str | None]:
    """Return the CUDA_VISIBLE_DEVICES of each process: one per GPU, unless a cell names its device."""
    several = len(gpus) > 1 and all(cell.config.run.device in ("auto", "cuda") for cell in cells)
    return gpus if several else [None]


def _check_not_swept(table: Mapping[str, Any], layers: Sequence[NamedLayer]) -> None:
    swept = {*table, *(key for variant in table.get("variant", []) for key in variant)}
    for name, layer in layers:
        for key in (f"{section}.{key}" for section, values in layer.items() for key in values):
            if key in swept:
                raise UserError(f"the sweep sets {key}, so it can't be given", name, "leave it out, or choose --cells")


def _list(folder: "Folder", cells: Sequence["Cell"], console: "RunConsole") -> int:
    listed = [{"cell": cell.number, "name": cell.name, "status": folder.state(cell.name).status} for cell in cells]
    if console.stderr:
        print(json.dumps({"sweep": str(folder.path), "cells": listed}, indent=2))
        return 0
    print(f"{len(cells)} cells, in {folder.path}")
    for cell in listed:
        print(f"{cell['cell']:>5}  {cell['name']}  {cell['status']}")
    return 0


@contextmanager
def _naming(cell: "Cell") -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(error.what, f"{error.where}, cell {cell.number} ({cell.name})", error.tip) from error
