"""The folder of a sweep: sweep.toml, a run directory for each cell, and cells.csv."""

import csv
import io
import os
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from pdvit.config import to_dict
from pdvit.engine.recipe import changed_keys
from pdvit.errors import UserError
from pdvit.files import read_text, reading
from pdvit.sweep.cells import SWEEP, TABLE, Cell, make_cells, split
from pdvit.tracking.run_directory import CHECKPOINTS, FREE, JOBS, OTHER, STATUS, RunDirectory, held, write_file, writing

FACTS = ("status", "reason", "seconds", "commit", "hardware")
CellStatus = Literal["finished", "failed", "stopped", "waiting", "running"]


@dataclass(frozen=True)
class CellState:
    """The status of a cell, and its reason, if there is one."""

    status: CellStatus
    reason: str = ""


class Folder:
    """The files of a sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, base: Mapping[str, Any], table: Mapping[str, Any], cells: Sequence[Cell]) -> None:
        """Create or reopen the folder; raises UserError if it is of something else or of another sweep.

        A resumed sweep may have more cells than before; those that began must be the same.
        """
        text = f"# The settings of the cells here.\n\n{tomli_w.dumps({**base, 'sweep': table})}"
        file = self.path / SWEEP
        with writing("the sweep", self.path, f"{FREE}, or {OTHER}"):
            if file.is_file():
                begun = [cell for cell in self.read_cells() if (self.path / cell.name / "run.toml").exists()]
                _check_same(begun, cells, str(self.path))
            elif self.path.is_file() or (self.path.is_dir() and {*os.listdir(self.path)} - {JOBS}):
                what = "the folder exists already, and is not that of a sweep"
                raise UserError(what, str(self.path), OTHER)
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(file, text)

    def read_cells(self) -> list[Cell]:
        """Return the cells of sweep.toml; raises UserError if it is damaged."""
        file = self.path / SWEEP
        with reading(file, "restore it, or choose another --out", "the sweep can't be read"):
            base, table = split(tomllib.loads(read_text(file)), str(file))
            return make_cells(base, table or {}, str(file))

    def state(self, name: str, jobs: Mapping[str, str]) -> CellState:
        """Return the state of a cell; `jobs` has the states of those that have not ended. Without one, it was killed.

        A cell can also be trained by `--resume`.
        """
        written = self.written(name)
        if written.status == "finished":
            return written
        if name in jobs or held(self.path / name / CHECKPOINTS / ".lock"):
            return CellState("waiting" if jobs.get(name) == "PENDING" else "running")
        return CellState("stopped", "interrupted") if written.status == "running" else written

    def written(self, name: str) -> CellState:
        """Return the state in a cell's files."""
        run = RunDirectory(self.path / name)
        if not (run.path / STATUS).is_file():
            return CellState("running" if (run.path / "run.toml").is_file() else "waiting")
        try:
            facts = run.read_json(STATUS)
            if facts.get("status") == "finished":
                run.read_json("summary.json")
        except UserError as error:
            return CellState("failed", error.what)
        return CellState(facts.get("status", "failed"), facts.get("reason") or "")

    def write_table(self, jobs: Mapping[str, str]) -> list[tuple[Cell, CellState]]:
        """Write cells.csv from the run directories, and return every cell's state; `jobs` as in `state`."""
        states = [(cell, self.state(cell.name, jobs)) for cell in self.read_cells()]
        rows = [self._row(cell, state) for cell, state in states]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with writing(TABLE, self.path, FREE):
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
