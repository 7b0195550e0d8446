"""Definitions of the metrics of `analyze`, without torch: for help, tables, figures and docs."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Definition:
    """The meaning of a column, one row of the table in docs/metrics.md, and how the column is shown."""

    text: str
    range: str
    random: str
    identical: str
    bias: str
    source: str
    heading: str | None = None  # in a terminal; None for columns that are in the files only
    title: str | None = None  # of the panel in a figure; None: the name of the column
    low: float | None = None  # limits of the panel's axis, if any
    high: float | None = None


_FILE = Path(__file__).parent / "analysis" / "metrics" / "definitions.toml"  # beside the functions
GROUPS: dict[str, dict[str, Any]] = tomllib.loads(_FILE.read_text(encoding="utf-8"))
DEFAULT = ("similarity", "similarity_signed", "norms")
LIMIT = 256  # images that are measured, by default
DEFINITIONS = {column: Definition(**fields) for group in GROUPS.values() for column, fields in group["columns"].items()}
