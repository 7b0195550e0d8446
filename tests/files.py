"""Readers of what commands print and of the files that they write."""

import csv
import json
import tomllib
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def read_recipe(run: Path) -> dict[str, Any]:
    return tomllib.loads((run / "run.toml").read_text(encoding="utf-8"))


def read_csv(file: Path) -> list[dict[str, str]]:
    """Return the rows; bytes that are no UTF-8 (names of files) come as surrogates."""
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as opened:
        return list(csv.DictReader(opened))


def read_records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, all or those of one kind, without the numbers of the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time", None)
    return [line for line in lines if kind in (None, line["kind"])]


def newest_step(run: Path) -> int:
    """Return the step of the last whole record of a run, 0 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def assert_same(run: Path, other: Path) -> None:
    """Compare the records and the weights of two runs, bit for bit."""
    assert read_records(run) == read_records(other)
    assert weights(run) == weights(other)


def rewrite(run: Path, tensors: dict | None = None, config: dict | None = None) -> None:
    """Write a checkpoint again with other weights or another configuration."""
    from safetensors.torch import load_file, save_file

    file, new = run / "model.safetensors", run / "new.safetensors"  # tensors may lie in the old file
    save_file(tensors or load_file(file), new, {"config.json": json.dumps(config or read_json(run / "config.json"))})
    new.replace(file)
