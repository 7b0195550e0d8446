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
from pdvit.cli.runs import build_trainer, check_initial_weights, resume, start, train_to_end
from pdvit.config.duration import parse_duration
from pdvit.config.load import build, to_dict
from pdvit.config.schema import Config
from pdvit.errors import UserError
from pdvit.tasks.summary import describe_summary

if TYPE_CHECKING:
    from pdvit.engine.terminal import StopRequest
    from pdvit.sweep import Cell, Folder, State

# What a cell needs, imported once for all.
PRELOADED = (
    *(
        "pdvit.engine.trainer",
        "pdvit.tasks.classification",
        "pdvit.tasks.segmentation",
        "pdvit.models.initial",
        "pdvit.data.sources",
        "pdvit.tracking",
    ),
    *("sklearn.datasets", "sklearn.model_selection"),  # of the digits
)
# Of the file and the flags, what the whole sweep has and not each of its cells.
OF_THE_SWEEP = ("out", "name", "time_limit")
SHOWN = 10


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
        command: the name of the command that trains a cell.
        file: the file with the [sweep] table.
        layers: that file's and those of the command line, as for one run.
        chosen: which cells, as --cells says it; None is all.
        as_json: print one JSON object and nothing else on standard output.
        stop: stops the cell that runs too, resumable.
    Raises UserError before the first cell begins, and RunFailed where the check itself breaks down.
    """
    from pdvit.sweep import Folder, make_cells, split

    if os.environ.get("WORLD_SIZE", "1") != "1":
        tip = "start it without torchrun: each cell gets a device of its own"
        raise UserError("a sweep is not for several processes", "the environment", tip)
    where = str(file)
    base, table = split(dict(layers)[where], where)
    assert table is not None, "only files with a [sweep] table come here"
    merged = [(name, base if name == where else layer) for name, layer in layers]
    config = build(*merged)
    _refuse_swept(table, merged[merged.index((where, base)) + 1 :])
    asked = _merge([layer for _, layer in merged])
    cells = make_cells(asked, table, where)
    for cell in cells:
        try:
            check_initial_weights(command, cell.config)
        except UserError as error:
            raise _of_cell(error, cell) from error
    folder = Folder(_place(config, file))
    if chosen == "list":
        return _list(folder, cells, as_json)
    return Sweep(command, folder, cells, chosen, as_json).run(asked, table, config, stop)


class Sweep:
    """The cells that one command runs, and what is said of them."""

    def __init__(
        self, command: str, folder: "Folder", cells: Sequence["Cell"], chosen: str | None, as_json: bool
    ) -> None:
        self.command, self.folder, self.cells = command, folder, cells
        self.picked, self.again = _picked(folder, cells, chosen), chosen == "failed"
        self.as_json, self.console = as_json, make_console(as_json)
        self.mine: set[str] = set()
        self.seconds: list[float] = []

    def run(self, asked: Mapping[str, Any], table: Mapping[str, Any], config: Config, stop: "StopRequest") -> int:
        """Check the cells, run them, and return the exit status."""
        from pdvit.sweep import preload, run_apart, run_cells

        preload(PRELOADED)
        folder = self.folder
        folder.begin(asked, table, self.cells)
        folder.write_table()
        over = {"finished"} if self.again else {"finished", "failed"}
        todo = [cell for cell in self.picked if folder.written(cell.name).status not in over]
        log(self.console, f"{len(self.cells)} cells in {folder.path}, {len(todo)} of them to do now")
        self.left = len(todo)
        if todo:
            new = [cell for cell in todo if not (folder.path / cell.name / "run.toml").is_file()]
            log(self.console, "checking their configurations ...")
            gpus = run_apart(_check, folder.log("check"), stop, self.command, new) or []
            self.devices = devices_of(todo, gpus)
            train = partial(train_cell, self.command)
            run_cells(folder, todo, train, self.devices, stop, self.report, _limit(config))
        return self.close()

    def report(self, cell: "Cell", state: "State", seconds: float) -> None:
        """Say that a cell begins or how it ended, and bring the table up to date."""
        begins = cell.name not in self.mine
        self.mine ^= {cell.name}
        self.folder.write_table(self.mine)
        said = f"cell {cell.number} of {len(self.cells)}: {cell.name}"
        if begins:
            log(self.console, f"{said} ...")
            return
        if state.status == "finished" and seconds:
            self.seconds.append(seconds)
        self.left -= 1
        told = f"{said}: {self._outcome(cell, state, seconds)}"
        if self.left > 0 and self.seconds:
            told += f"; about {_time(statistics.mean(self.seconds) * self.left / len(self.devices))} left"
        log(self.console, told)

    def close(self) -> int:
        """Write the table, say what became of the cells, and return the exit status."""
        from pdvit.engine.terminal import EXIT_STOPPED
        from pdvit.sweep.folder import CellStatus

        states = {cell.name: state for cell, state in self.folder.write_table()}
        states = {cell.name: states[cell.name] for cell in self.picked}
        counts = Counter(state.status for state in states.values())
        if self.as_json:
            statuses = {status: counts[status] for status in get_args(CellStatus)}
            print(json.dumps({"sweep": str(self.folder.path), "cells": len(states)} | statuses, indent=2))
        parts = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none failed"
        log(self.console, f"\n{len(states)} cells: {parts}\ntable     {self.folder.path}/cells.csv")
        broken = [f"  {name}: {state.reason}" for name, state in states.items() if state.status == "failed"]
        for line in broken[:SHOWN]:
            log(self.console, line)
        if broken:
            more = f"and {len(broken) - SHOWN} more; " if len(broken) > SHOWN else ""
            log(self.console, f"{more}logs in {self.folder.path}/logs; to try them again: --cells failed")
        if counts["stopped"] or counts["waiting"] or counts["running"]:
            log(self.console, "the same command goes on")
            return EXIT_STOPPED
        return 1 if broken else 0

    def _outcome(self, cell: "Cell", state: "State", seconds: float) -> str:
        if state.status == "finished":
            summary = json.loads((self.folder.path / cell.name / "summary.json").read_text(encoding="utf-8"))
            numbers = {name: math.nan if value is None else value for name, value in summary.items()}
            told = describe_summary(numbers).splitlines()[0]
            return f"finished {f'in {_time(seconds)}' if seconds else 'by another process'}; {told}"
        if state.status == "running":
            return "another process trains it"
        return f"{state.status}{': ' if state.reason else ''}{state.reason}"


def train_cell(command: str, config: Config, run: Path) -> int:
    """Begin the run of a cell, or go on with it; return the exit status, and raise UserError and RunFailed."""
    from pdvit.engine.terminal import stop_on_signals

    with stop_on_signals() as stop:
        if (run / "run.toml").is_file():
            prepared = resume(command, str(run), [], as_json=False)
        else:
            prepared = start(command, replace(config, run=replace(config.run, out=str(run))), False, stop)
        return prepared if isinstance(prepared, int) else train_to_end(prepared, stop)


def _check(command: str, cells: Sequence["Cell"]) -> list[str]:
    """Prepare every configuration as its run will, seeds aside; raises UserError; returns the GPUs that are there."""
    from pdvit.engine.device import visible_gpus

    known: list[dict[str, Any]] = []
    for cell in cells:
        facts = to_dict(replace(cell.config, run=replace(cell.config.run, seed=0)))
        if facts in known:
            continue
        known.append(facts)
        try:
            build_trainer(cell.config, make_console(as_json=False))
        except UserError as error:
            raise _of_cell(error, cell) from error
    return visible_gpus()


def devices_of(cells: Sequence["Cell"], gpus: Sequence[str]) -> Sequence[str | None]:
    """Return the CUDA_VISIBLE_DEVICES of each process: one per GPU, where cells leave open which one they take."""
    spread = len(gpus) > 1 and all(cell.config.run.device in ("auto", "cuda") for cell in cells)
    return gpus if spread else [None]


def _refuse_swept(table: Mapping[str, Any], given: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise UserError where the command line sets what the sweep sets."""
    variants = table.get("variant")
    variants = [bundle for bundle in variants if isinstance(bundle, Mapping)] if isinstance(variants, list) else []
    swept = {key for part in (table, *variants) for key in part}
    for name, layer in given:
        for section, values in layer.items():
            for key in values:
                if f"{section}.{key}" in swept:
                    what = f"the sweep sets {section}.{key}, so it can't be given"
                    raise UserError(what, name, "leave it out, or choose --cells")


def _merge(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what was asked for in one table, later layers first."""
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in layer.items():
            merged[section] = merged.get(section, {}) | dict(values)
    merged["run"] = {key: value for key, value in merged.get("run", {}).items() if key not in OF_THE_SWEEP}
    return merged


def _place(config: Config, file: Path) -> Path:
    from pdvit.tracking import RUNS

    if config.run.out is not None:
        return Path(os.path.expanduser(config.run.out))
    return RUNS / (config.run.name or file.stem)


def _limit(config: Config) -> float | None:
    """Return the seconds after which the sweep stops."""
    limit = config.run.time_limit
    return None if limit is None else parse_duration(limit, "min", "run.time_limit", clock=True).seconds


def _picked(folder: "Folder", cells: Sequence["Cell"], chosen: str | None) -> list["Cell"]:
    from pdvit.sweep import numbers

    if chosen == "failed":
        return [cell for cell in cells if folder.written(cell.name).status == "failed"]
    wanted = set(range(1, len(cells) + 1)) if chosen is None else numbers(chosen, len(cells))
    return [cell for cell in cells if cell.number in wanted]


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


def _time(seconds: float) -> str:
    """Say a length of time as one would."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
