"""A sweep: check its cells, run them, and print their outcomes."""

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pdvit.cli.console import log, make_console
from pdvit.cli.options import merge_layers
from pdvit.cli.runs import build_trainer, check_initial_weights, resume, start, train_to_end
from pdvit.config.duration import parse_duration
from pdvit.config.load import build, to_dict
from pdvit.config.schema import Config
from pdvit.errors import UserError
from pdvit.tasks.summary import describe_summary

if TYPE_CHECKING:
    from pdvit.engine.terminal import StopRequest
    from pdvit.sweep import Cell, CellState, Folder

# The imports of a cell, made once for all.
PRELOADED = (
    *("pdvit.engine.trainer", "pdvit.tasks.classification", "pdvit.tasks.segmentation", "pdvit.models.loading"),
    *("pdvit.data.sources", "pdvit.tracking.environment", "sklearn.datasets", "sklearn.model_selection"),
)
# Settings of the whole sweep, not of its cells.
OF_THE_SWEEP = ("out", "name", "time_limit")
MAX_FAILURES = 10


def run_sweep(
    command: str,
    file: Path,
    layers: Sequence[tuple[str, Mapping[str, Any]]],
    chosen: str | None,
    as_json: bool,
    stop: "StopRequest",
) -> int:
    """Run the cells of a sweep that are not finished, or list them; return the exit status.

    Args:
        command: the command that trains a cell.
        file: the file with the [sweep] table.
        layers: of that file and the command line, as for one run.
        chosen: the value of --cells; None is all.
        as_json: print only one JSON object on standard output.
        stop: also stops the running cell, resumable.
    Raises UserError before the first cell starts, and RunFailed if the check itself fails.
    """
    from pdvit.sweep import Folder, make_cells, split
    from pdvit.tracking.run_directory import RUNS

    if os.environ.get("WORLD_SIZE", "1") != "1":
        tip = "start it without torchrun: each cell gets its own device"
        raise UserError("a sweep is not for several processes", "the environment", tip)
    where = str(file)
    base, table = split(dict(layers)[where], where)
    assert table is not None, "only files with a [sweep] table come here"
    merged = [(name, base if name == where else layer) for name, layer in layers]
    config = build(*merged)
    _check_not_swept(table, merged[merged.index((where, base)) + 1 :])
    settings = merge_layers(layer for _, layer in merged)
    settings["run"] = {key: value for key, value in settings.get("run", {}).items() if key not in OF_THE_SWEEP}
    cells = make_cells(settings, table, where)
    for cell in cells if command == "finetune" else ():
        try:
            check_initial_weights(cell.config)
        except UserError as error:
            raise _of_cell(error, cell) from error
    out = config.run.out
    folder = Folder(Path(os.path.expanduser(out)) if out is not None else RUNS / (config.run.name or file.stem))
    if chosen == "list":
        return _list(folder, cells, as_json)
    return SweepRun(command, folder, cells, chosen, as_json).run(settings, table, config, stop)


class SweepRun:
    """The cells that one command runs, and what it prints of them."""

    def __init__(
        self, command: str, folder: "Folder", cells: Sequence["Cell"], chosen: str | None, as_json: bool
    ) -> None:
        from pdvit.sweep import numbers

        self.command, self.folder, self.cells, self.again = command, folder, cells, chosen == "failed"
        if self.again:
            self.chosen = [cell for cell in cells if folder.written(cell.name).status == "failed"]
        else:
            named = set(range(1, len(cells) + 1)) if chosen is None else numbers(chosen, len(cells))
            self.chosen = [cell for cell in cells if cell.number in named]
        self.as_json, self.console = as_json, make_console(as_json)
        self.running: set[str] = set()
        self.seconds: list[float] = []

    def run(self, settings: Mapping[str, Any], table: Mapping[str, Any], config: Config, stop: "StopRequest") -> int:
        """Check the cells, run them, and return the exit status."""
        from pdvit.sweep import preload, run_apart, run_cells

        preload(PRELOADED)
        folder, limit = self.folder, config.run.time_limit
        folder.begin(settings, table, self.cells)
        folder.write_table()
        over = {"finished"} if self.again else {"finished", "failed"}
        todo = [cell for cell in self.chosen if folder.written(cell.name).status not in over]
        log(self.console, f"{len(self.cells)} cells in {folder.path}, {len(todo)} of them to do now")
        self.left = len(todo)
        if todo:
            new = [cell for cell in todo if not (folder.path / cell.name / "run.toml").is_file()]
            log(self.console, "checking their configurations ...")
            gpus = run_apart(_check, folder.log("check"), stop, self.command, new) or []
            self.devices = devices_of(todo, gpus)
            seconds = None if limit is None else parse_duration(limit, "min", "run.time_limit", clock=True).seconds
            run_cells(folder, todo, partial(train_cell, self.command), self.devices, stop, self.report, seconds)
        return self.close()

    def report(self, cell: "Cell", state: "CellState", seconds: float) -> None:
        """Print the start or the end of a cell, and update the table."""
        starts = cell.name not in self.running
        self.running ^= {cell.name}
        self.folder.write_table(self.running)
        line = f"cell {cell.number} of {len(self.cells)}: {cell.name}"
        if starts:
            log(self.console, f"{line} ...")
            return
        if state.status == "finished" and seconds:
            self.seconds.append(seconds)
        self.left -= 1
        line += f": {self._outcome(cell, state, seconds)}"
        if self.left > 0 and self.seconds:
            line += f"; about {_duration(statistics.mean(self.seconds) * self.left / len(self.devices))} left"
        log(self.console, line)

    def close(self) -> int:
        """Write the table, print the outcomes, and return the exit status."""
        from pdvit.engine.terminal import EXIT_STOPPED
        from pdvit.sweep.folder import CellStatus

        states = {cell.name: state for cell, state in self.folder.write_table()}
        states = {cell.name: states[cell.name] for cell in self.chosen}
        counts = Counter(state.status for state in states.values())
        if self.as_json:
            statuses = {status: counts[status] for status in get_args(CellStatus)}
            print(json.dumps({"sweep": str(self.folder.path), "cells": len(states)} | statuses, indent=2))
        parts = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none failed"
        log(self.console, f"\n{len(states)} cells: {parts}\ntable     {self.folder.path}/cells.csv")
        failed = [f"  {name}: {state.reason}" for name, state in states.items() if state.status == "failed"]
        for line in failed[:MAX_FAILURES]:
            log(self.console, line)
        if failed:
            more = f"and {len(failed) - MAX_FAILURES} more; " if len(failed) > MAX_FAILURES else ""
            log(self.console, f"{more}logs in {self.folder.path}/logs; to run them again: --cells failed")
        if counts["stopped"] or counts["waiting"] or counts["running"]:
            log(self.console, "the same command resumes the sweep")
            return EXIT_STOPPED
        return 1 if failed else 0

    def _outcome(self, cell: "Cell", state: "CellState", seconds: float) -> str:
        if state.status == "finished":
            summary = json.loads((self.folder.path / cell.name / "summary.json").read_text(encoding="utf-8"))
            numbers = {name: math.nan if value is None else value for name, value in summary.items()}
            metrics = describe_summary(numbers).splitlines()[0]
            return f"finished {f'in {_duration(seconds)}' if seconds else 'by another process'}; {metrics}"
        if state.status == "running":
            return "another process trains it"
        return f"{state.status}{': ' if state.reason else ''}{state.reason}"


def train_cell(command: str, config: Config, run: Path) -> int:
    """Start or resume the run of a cell; return the exit status, and raise UserError and RunFailed."""
    from pdvit.engine.terminal import stop_on_signals

    with stop_on_signals() as stop:
        if (run / "run.toml").is_file():
            prepared = resume(command, str(run), [], as_json=False)
        else:
            prepared = start(command, replace(config, run=replace(config.run, out=str(run))), False, stop)
        return prepared if isinstance(prepared, int) else train_to_end(prepared, stop)


def _check(command: str, cells: Sequence["Cell"]) -> list[str]:
    """Build the trainer of every configuration, once for all seeds; raises UserError; returns the visible GPUs."""
    from pdvit.engine.device import visible_gpus

    checked: list[dict[str, Any]] = []
    for cell in cells:
        settings = to_dict(replace(cell.config, run=replace(cell.config.run, seed=0)))
        if settings in checked:
            continue
        checked.append(settings)
        try:
            build_trainer(cell.config, make_console(as_json=False))
        except UserError as error:
            raise _of_cell(error, cell) from error
    return visible_gpus()


def devices_of(cells: Sequence["Cell"], gpus: Sequence[str]) -> Sequence[str | None]:
    """Return the CUDA_VISIBLE_DEVICES of each process: one per GPU, unless a cell names its device."""
    several = len(gpus) > 1 and all(cell.config.run.device in ("auto", "cuda") for cell in cells)
    return gpus if several else [None]


def _check_not_swept(table: Mapping[str, Any], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise UserError if the command line sets a key of the sweep."""
    variants = table.get("variant")
    variants = [bundle for bundle in variants if isinstance(bundle, Mapping)] if isinstance(variants, list) else []
    swept = {key for part in (table, *variants) for key in part}
    for name, layer in layers:
        for section, values in layer.items():
            for key in values:
                if f"{section}.{key}" in swept:
                    what = f"the sweep sets {section}.{key}, so it can't be given"
                    raise UserError(what, name, "leave it out, or choose --cells")


def _list(folder: "Folder", cells: Sequence["Cell"], as_json: bool) -> int:
    states = [(cell, folder.state(cell.name)) for cell in cells]
    if as_json:
        listed = [{"cell": cell.number, "name": cell.name, "status": state.status} for cell, state in states]
        print(json.dumps({"sweep": str(folder.path), "cells": listed}, indent=2))
        return 0
    print(f"{len(cells)} cells, in {folder.path}")
    for cell, state in states:
        print(f"{cell.number:>5}  {cell.name}  {state.status}")
    return 0


def _of_cell(error: UserError, cell: "Cell") -> UserError:
    return UserError(error.what, f"{error.where}, cell {cell.number} ({cell.name})", error.tip)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
