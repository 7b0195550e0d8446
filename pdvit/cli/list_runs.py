"""`pdvit runs`: one row for each run below a folder, read from the files of its directory."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pdvit.config.duration import describe_duration
from pdvit.config.load import build, read_toml
from pdvit.config.recipes import terms_of
from pdvit.errors import UserError, command, printable
from pdvit.tracking.run_directory import RUNS, RunDirectory
from pdvit.workflows.console import log, make_console

NUMBERS = ("accuracy", "miou", "similarity_last", "seconds")  # in the summary of a finished run
LARGEST = 1e12  # of a number that is shown


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that holds runs, at any depth.")] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON and nothing else.")] = False,
) -> None:
    """List runs: status, data, model, terms, accuracy, P, time."""
    from rich.cells import cell_len, set_cell_size

    paths = sorted(place for place, _, files in os.walk(folder) if {"run.toml", "status.json"} & {*files})
    if not paths:
        raise UserError("there are no runs", str(folder), f"name another folder, or start one: {command('train')}")
    rows = [{"run": path, **_read(Path(path))} for path in paths]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    names = ("status", "data", "model", "terms", "accuracy", "P", "time", "run")
    table = [names]  # the run comes last: a long name runs over the edge of the terminal as a whole
    for row in rows:
        model, data = (row.get("model") or "").partition("_patch")[0], os.path.basename(row.get("data", ""))
        score = f"mIoU {row['miou']:.1%}" if "miou" in row else f"{row['accuracy']:.1%}" if "accuracy" in row else ""
        similarity = f"{row['similarity_last']:.2f}" if "similarity_last" in row else ""
        took = describe_duration(row["seconds"]) if "seconds" in row else ""
        name = printable(os.path.relpath(row["run"], folder))
        table.append((row["status"], printable(data), model, row.get("terms", ""), score, similarity, took, name))
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    console = make_console(as_json=False)
    for number, texts in enumerate(table):
        padded = (
            " " * (width - cell_len(text)) + text if name in ("accuracy", "P", "time") else set_cell_size(text, width)
            for name, text, width in zip(names, texts, widths, strict=True)
        )
        log(console, " ".join(padded).rstrip(), "" if number else "bold")


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
        if row["status"] == "running" and not directory.held():  # it was killed
            row["status"] = "stopped"
    except UserError as error:
        row |= {"status": "unreadable", "reason": error.what}
    return row
