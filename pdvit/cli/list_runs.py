"""`pdvit runs`: one row for each run below a folder, read from the files of its directory."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pdvit.config.load import build, read_toml
from pdvit.config.recipes import terms_of
from pdvit.errors import UserError, command
from pdvit.tracking.run_directory import CHECKPOINTS, RUNS, RunDirectory, held
from pdvit.workflows.console import cell, duration, make_console

NUMBERS = ("accuracy", "miou", "similarity_last", "seconds")  # in the summary of a finished run
LARGEST = 1e12  # of a number that is shown


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that holds runs, at any depth.")] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON and nothing else.")] = False,
) -> None:
    """List runs: status, data, model, terms, accuracy, P, time."""
    from rich.table import Table

    paths = sorted(place for place, _, files in os.walk(folder) if {"run.toml", "status.json"} & {*files})
    if not paths:
        raise UserError("there are no runs", str(folder), f"name another folder, or start one: {command('train')}")
    rows = [{"run": path, **_read(Path(path))} for path in paths]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("run", "status", "data", "model", "terms", "accuracy", "P", "time"):
        numeric = name in ("accuracy", "P", "time")
        table.add_column(name, overflow="fold", no_wrap=numeric, justify="right" if numeric else "left")
    for row in rows:
        texts = [os.path.relpath(row["run"], folder), row["status"], os.path.basename(row.get("data", ""))]
        texts += [(row.get("model") or "").partition("_patch")[0], row.get("terms", "")]
        score = f"mIoU {row['miou']:.1%}" if "miou" in row else f"{row['accuracy']:.1%}" if "accuracy" in row else ""
        similarity = f"{row['similarity_last']:.2f}" if "similarity_last" in row else ""
        texts += [score, similarity, duration(row["seconds"]) if "seconds" in row else ""]
        table.add_row(*map(cell, texts))
    make_console(as_json=False).print(table)


def _read(path: Path) -> dict[str, Any]:
    """Return what the files of a run hold; if one is damaged, its status is unreadable."""
    directory, row = RunDirectory(path), dict[str, Any](status="started")
    try:
        if (path / "run.toml").is_file():
            config = build((str(path), read_toml(path / "run.toml")))
            row |= {"data": config.data.source, "model": config.model.name, "terms": terms_of(config.diversity)}
        row["status"] = str(directory.read_json("status.json", optional=True).get("status", "started"))
        summary = directory.read_json("summary.json", optional=True)
        numbers = {name: summary[name] for name in NUMBERS if type(summary.get(name)) in (int, float)}
        row |= {name: value for name, value in numbers.items() if abs(value) < LARGEST}  # NaN fails too
        if row["status"] == "running" and not held(path / CHECKPOINTS / ".lock"):  # it was killed
            row["status"] = "stopped"
    except UserError as error:
        row |= {"status": "unreadable", "reason": error.what}
    return row
