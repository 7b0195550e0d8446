"""The folder of a sweep: sweep.toml, a run directory for each cell, and cells.csv."""

import csv
import io
import os
import tomllib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from pdvit.config import to_dict
from pdvit.engine.recipe import changed_keys
from pdvit.errors import UserError
from pdvit.files import read_text, reading
from pdvit.sweep.cells import LOGS, SWEEP, TABLE, Cell, make_cells, split
from pdvit.tracking.run_directory import FREE, OTHER, RunDirectory, Status, held, hold, write_file, writing

FACTS = ("status", "reason", "seconds", "commit", "hardware")
CellStatus = Literal["finished", "failed", "stopped", "waiting", "running"]


@dataclass(frozen=True)
class CellState:
    """The status of a cell, and its reason, if there is one."""

    status: CellStatus
    reason: str = ""


class Folder:
    """The files of a sweep, which several processes may run. The process that trains a cell holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / LOGS / ".lock"  # held for a moment; does not nest: closing a file releases all its locks

    def log(self, name: str) -> Path:
        """Return the file of a cell's output."""
        return self.path / LOGS / f"{name}.txt"

    def begin(self, base: Mapping[str, Any], table: Mapping[str, Any], cells: Sequence[Cell]) -> None:
        """Create or reopen the folder; raises UserError if it is of something else or of another sweep.

        A resumed sweep may have more cells than before; those that began must be the same.
        """
        text = f"# The settings of the cells here.\n\n{tomli_w.dumps({**base, 'sweep': table})}"
        file = self.path / SWEEP
        with writing("the sweep", self.path, f"{FREE}, or {OTHER}"):
            # Not LOGS, and not a file of a process that starts the same sweep just now.
            names = os.listdir(self.path) if self.path.is_dir() else []
            strange = [name for name in names if name != LOGS and not name.startswith(f".{SWEEP}.")]
            if (strange or self.path.is_file()) and not file.is_file():  # another process may write it meanwhile
                what = "the folder exists already, and is not that of a sweep"
                raise UserError(what, str(self.path), OTHER)
            (self.path / LOGS).mkdir(parents=True, exist_ok=True)
            with hold(self.lock, wait=True):
                if file.is_file():
                    begun = [cell for cell in self.read_cells() if (self.path / cell.name).exists()]
                    _check_same(begun, cells, str(self.path))
                if not file.is_file() or file.read_text(encoding="utf-8") != text:
                    write_file(file, text)

    def read_cells(self) -> list[Cell]:
        """Return the cells of sweep.toml; raises UserError if it is damaged."""
        file = self.path / SWEEP
        with reading(file, "restore it, or choose another --out", "the sweep can't be read"):
            base, table = split(tomllib.loads(read_text(file)), str(file))
            return make_cells(base, table or {}, str(file))

    def state(self, name: str) -> CellState:
        """Return the state of a cell. If its status is running and nobody holds its lock, it was interrupted."""
        written = self.written(name)
        if written.status != "finished" and self._held(name):
            return CellState("running")
        return CellState("stopped", "interrupted") if written.status == "running" else written

    def written(self, name: str) -> CellState:
        """Return the state in a cell's files, without its lock."""
        run = RunDirectory(self.path / name)
        if not (run.path / "status.json").is_file():
            return CellState("running" if (run.path / "run.toml").is_file() else "waiting")
        try:
            facts = run.read_json("status.json")
            if facts.get("status") == "finished":
                run.read_json("summary.json")
        except UserError as error:
            return CellState("failed", error.what)
        return CellState(facts.get("status", "failed"), facts.get("reason") or "")

    def mark(self, name: str, status: Status, reason: str) -> None:
        """Write how a cell ended, if its run could not; raises UserError if the write fails."""
        run = RunDirectory(self.path / name)
        run.path.mkdir(exist_ok=True)
        known = run.read_json("status.json", optional=True)
        run.write("status.json", {**known, "status": status, "reason": reason})

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Hold the lock of a cell; False if another process trains it."""
        with ExitStack() as stack:
            with hold(self.lock, wait=True):
                free = not self._held(name)
                if free:
                    stack.enter_context(hold(self.path / LOGS / f".{name}.lock"))
            run = self.path / name
            if free and not (run / "run.toml").is_file():  # it ended before it began; a new run needs an empty folder
                for file in (run / "status.json", *run.glob(".run.toml.*"), *run.glob(".status.json.*")):
                    file.unlink(missing_ok=True)
                with suppress(OSError):
                    (run / "checkpoints").rmdir()
            yield free

    def write_table(self, begun: Container[str] = ()) -> list[tuple[Cell, CellState]]:
        """Write cells.csv from the run directories, and return every cell's state.

        The cells are those of sweep.toml, since another process may have added some. Those that this process has
        `begun` count as running, even before they hold their locks.
        """
        with hold(self.lock, wait=True):
            running = CellState("running")
            states = [(cell, running if cell.name in begun else self.state(cell.name)) for cell in self.read_cells()]
            rows = [self._row(cell, state) for cell, state in states]
            columns = list(dict.fromkeys(name for row in rows for name in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_file(self.path / TABLE, text.getvalue())
        return states

    def _row(self, cell: Cell, state: CellState) -> dict[str, Any]:
        run = RunDirectory(self.path / cell.name)
        row = {"cell": cell.number, "name": cell.name, "variant": cell.variant, **cell.values}
        row |= dict.fromkeys(FACTS, "") | {"status": state.status, "reason": state.reason}
        if (run.path / "environment.json").is_file():
            with suppress(UserError):  # a damaged file of one cell stops no sweep
                environment = run.read_json("environment.json")
                on_cpu = f"{environment.get('processor')}, {environment.get('cores')} cores"
                device = environment.get("device")
                row |= {"commit": environment.get("commit"), "hardware": on_cpu if device == "cpu" else device}
        if state.status == "finished":
            summary = run.read_json("summary.json")
            row |= {name: value for name, value in summary.items() if type(value) in (int, float)}
        return row

    def _held(self, name: str) -> bool:
        """Return whether a process trains the cell, for the sweep or with --resume."""
        return held(self.path / LOGS / f".{name}.lock") or held(self.path / name / "checkpoints" / ".lock")


def _check_same(before: Sequence[Cell], now: Sequence[Cell], where: str) -> None:
    tip = "choose another --out; a resumed sweep may only have more cells: more values, variants or seeds"
    known = {cell.name: cell for cell in now}
    for cell in before:
        if cell.name not in known:
            raise UserError(f"the sweep here has a cell '{cell.name}', which is no longer in the file", where, tip)
        if changes := changed_keys(to_dict(cell.config), to_dict(known[cell.name].config)):
            key, (old, new) = next(iter(changes.items()))
            what = f"'{cell.name}' is another run now: {key} was {old!r}, is {new!r}"
            raise UserError(what, where, tip)
