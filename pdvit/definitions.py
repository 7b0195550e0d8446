"""Definitions of the metrics of `analyze`, without torch: for help, tables, figures and docs.

`python -m pdvit.definitions` prints the table and the list of curves of docs/metrics.md.
"""

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
DEFINITIONS = {column: Definition(**fields) for group in GROUPS.values() for column, fields in group["columns"].items()}


def markdown_table() -> str:
    """Return every column with its definition, as Markdown."""
    lines = ["| group | column | definition, per image | range | random tokens | identical tokens | bias | source |"]
    lines.append("| --- " * 8 + "|")
    for group, content in GROUPS.items():
        for column in content["columns"]:
            it = DEFINITIONS[column]
            cells = " | ".join((it.text.replace("|", "\\|"), it.range, it.random, it.identical, it.bias, it.source))
            lines.append(f"| `{group}` | `{column}` | {cells} |")
    return "\n".join(lines)


def markdown_curves() -> str:
    """Return the files of curves with their arrays, as Markdown."""
    curves = {group: content["curves"] for group, content in GROUPS.items() if "curves" in content}
    texts = {group: "; ".join(f"`{name}`, {text}" for name, text in arrays.items()) for group, arrays in curves.items()}
    return "\n".join(f"- `analysis/{group}.npz`: {text}" for group, text in texts.items())


if __name__ == "__main__":
    print(markdown_table(), markdown_curves(), sep="\n\n")
