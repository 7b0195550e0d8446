"""Sweeps: the cells of a [sweep] table, and their folder with sweep.toml, a run directory for each, and cells.csv."""

import csv
import io
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import tomli_w

from pdvit.config import Config, build, resolve, to_dict
from pdvit.config.load import PLACES, SWEEP_SECTION
from pdvit.config.recipes import merge_layers, text_in_name
from pdvit.engine.recipe import changed_keys
from pdvit.errors import UserError, adding
from pdvit.files import read_text, reading
from pdvit.tracking.run_directory import FREE, JOBS, OTHER, STATUS, RunDirectory, refuse_taken, write_file, writing

SEED = "run.seed"
SWEEP, TABLE = "sweep.toml", "cells.csv"  # names in its folder that no cell can have, beside JOBS
MAX_NAME = 200  # bytes; most file systems allow 255
EXAMPLE = '"optim.lr" = [1e-3, 3e-3]'
REFERENCE = re.compile(r"\{([\w.]+)\}")  # to a value of the cell, in other values
FACTS = ("status", "reason", "seconds", "commit", "hardware")
CellStatus = Literal["finished", "failed", "stopped", "waiting", "running"]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    number: int  # from 1
    name: str  # of its folder
    variant: str  # empty without variants
    values: Mapping[str, Any]  # of the crossed keys, {section.key: value}, in the order of the table
    config: Config  # not resolved


def make_cells(base: Mapping[str, Mapping[str, Any]], table: Mapping[str, Any], where: str) -> list[Cell]:
    """Return the cells of a sweep over `base` with checked configurations; raises UserError that names the cell.

    Seeds are the outermost loop, so that an unfinished sweep has whole rounds of all cells, and later seeds come last.
    Then come the variants, then the keys in the order of the table, the last one changing fastest.
    """
    if not (isinstance(table, Mapping) and table):
        raise UserError("the [sweep] table is empty", where, f"write [sweep], and below it for example {EXAMPLE}")
    where = f"[sweep] of {where}"
    variants = _variants(table.get("variant", []), where)
    axes = {key: values for key, values in table.items() if key != "variant"}
    for key, values in axes.items():
        _check_key(key, values, where)
        if not (isinstance(values, list) and values):
            raise UserError(f"'{key}' needs a list of values", where, f"for example {EXAMPLE}")
    for name, bundle in variants.items():
        if twice := [key for key in bundle if key in axes]:
            what = f"'{twice[0]}' is crossed, and variant '{name}' sets it too"
            raise UserError(what, where, "leave one of them out")
    outer, inner = [key for key in axes if key == SEED], [key for key in axes if key != SEED]
    names = [key.partition(".")[2] for key in axes]
    short = {key: name if names.count(name) == 1 else key for key, name in zip(axes, names, strict=True)}
    cells: list[Cell] = []
    for values in product(*(axes[key] for key in outer), variants or {"": {}}, *(axes[key] for key in inner)):
        chosen = dict(zip([*outer, "variant", *inner], values, strict=True))
        variant = chosen.pop("variant")
        named = [f"{short[key]}={text_in_name(chosen[key])}" for key in [*inner, *outer]]
        name = "-".join([*([variant] if variant else []), *named])
        number, chosen = len(cells) + 1, {key: chosen[key] for key in axes}
        words = {"variant": variant, **chosen}
        bundle = _substitute(variants.get(variant, {}), words)
        config = _config(_substitute(base, words), bundle | chosen, f"cell {number} ({name}) of {where}")
        cells.append(Cell(number, name, variant, chosen, config))
    _check_names([cell.name for cell in cells], where)
    return cells


def numbers(text: str, count: int) -> set[int]:
    """Parse --cells: `3`, `3-7`, `5-`, several with commas, of `count` cells; raises UserError."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d*)\s*)?", part)
        first = int(match[1]) if match else 0
        last = int(match[3] or count) if match and match[2] else first
        if not 1 <= first <= last <= count:
            tip = f"give numbers from 1 to {count}, such as 3-7 or 1,4,9-, or list, or failed"
            raise UserError(f"there are no cells '{part.strip()}'", "--cells", tip)
        found |= set(range(first, last + 1))
    return found


def _variants(tables: Any, where: str) -> dict[str, dict[str, Any]]:
    """Return the variants by name, each as `{section.key: value}`."""
    if not (isinstance(tables, list) and all(isinstance(table, Mapping) for table in tables)):
        raise UserError("'variant' is no key", where, "begin each bundle with [[sweep.variant]] and give it a name")
    found: dict[str, dict[str, Any]] = {}
    for number, table in enumerate(tables, 1):
        bundle = dict(table)
        name = bundle.pop("name", None)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+%-]*", name):
            what = f"variant {number} has no name" if name is None else f"{name!r} is no name for a variant"
            raise UserError(what, where, 'write for example name = "baseline"; letters, digits and ._+- only')
        if name in found:
            raise UserError(f"two variants are named '{name}'", where, "rename one of them")
        for key, value in bundle.items():
            _check_key(key, value, f"variant '{name}' in {where}")
        found[name] = bundle
    return found


def _substitute(value: Any, words: Mapping[str, Any]) -> Any:
    """Replace `{variant}` and `{section.key}` by the values of the cell; other braces stay."""
    if isinstance(value, Mapping):
        return {key: _substitute(part, words) for key, part in value.items()}
    if isinstance(value, list):
        return [_substitute(part, words) for part in value]
    if not isinstance(value, str):
        return value
    return REFERENCE.sub(lambda match: str(words.get(match[1], match[0])), value)


def _check_key(key: str, value: Any, where: str) -> None:
    if "." not in key:
        if isinstance(value, Mapping) and value:
            inner = f'"{key}.{next(iter(value))}"'
            raise UserError(f"'{key}' is a section, not a key", where, f"put the whole key in quotes: {inner} = ...")
        tip = f"write section.key, for example {EXAMPLE}, or [[sweep.variant]]"
        raise UserError(f"'{key}' is not section.key", where, tip)
    if key.startswith(PLACES):
        raise UserError(f"'{key}' can't be swept", where, "set it for the whole sweep, outside of [sweep]")


def _config(base: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any], where: str) -> Config:
    """Return the configuration of a cell, checked without its data and model."""
    parts = ((*key.split(".", 1), value) for key, value in values.items())
    layer = merge_layers({section: {name: value}} for section, name, value in parts)
    config = build((where, base), (where, layer))
    if config.data.batch_size:  # auto is found on the device, and the learning rate depends on it
        with adding(f", {where}"):
            resolve(config)
    return config


def _check_names(names: Sequence[str], where: str) -> None:
    tip = "leave one out, or make [[sweep.variant]] bundles of these values, with names of their own"
    for number, name in enumerate(names):
        if name in ("", SWEEP, TABLE, JOBS):
            what = f"a cell would be named '{name}', as a file of the sweep" if name else "a cell would have no name"
            raise UserError(what, where, "name each [[sweep.variant]] otherwise, or cross a key such as run.seed")
        if name in names[:number]:
            raise UserError(f"two cells would be named '{name}'", where, tip)
        if len(name.encode()) > MAX_NAME:
            raise UserError(f"the name '{name[:60]}...' is too long for a folder", where, tip)


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
        text = f"# The settings of the cells here.\n\n{tomli_w.dumps({**base, SWEEP_SECTION: table})}"
        file = self.path / SWEEP
        with writing("the sweep", self.path, f"{FREE}, or {OTHER}"):
            if file.is_file():
                begun = [cell for cell in self.read_cells() if (self.path / cell.name / "run.toml").exists()]
                _check_same(begun, cells, str(self.path))
            else:
                refuse_taken(str(self.path))
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(file, text)

    def read_cells(self) -> list[Cell]:
        """Return the cells of sweep.toml; raises UserError if it is damaged."""
        file = self.path / SWEEP
        with reading(file, "restore it, or name the folder of a sweep", "the sweep can't be read"):
            base = tomllib.loads(read_text(file))
            return make_cells(base, base.pop(SWEEP_SECTION), str(file))

    def state(self, name: str, jobs: Mapping[str, str]) -> CellState:
        """Return the state of a cell; `jobs` has the states of those that have not ended. Without one, it was killed.

        A cell can also be trained by `--resume`.
        """
        written = self.written(name)
        if written.status == "finished":
            return written
        if name in jobs or RunDirectory(self.path / name).held():
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
