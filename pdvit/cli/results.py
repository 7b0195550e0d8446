"""What an evaluation gives, whatever the checkpoint does, and the words in which it is shown."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdvit.errors import UserError, closest

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.data.sources import Source, Split

# Classes that the terminal shows.
WORST = 10


@dataclass(frozen=True)
class Evaluation:
    """Numbers by name, a table by class, and the files to write (name -> content)."""

    facts: dict[str, Any]
    table: "pd.DataFrame"
    files: dict[str, bytes]


def split_named(source: "Source", wanted: str | None) -> str:
    """Return the name of the split to measure: unset, that of the closing numbers; UserError where there is none."""
    name = wanted or source.final_split
    if name not in source.splits:
        raise UserError(f"{source.name} has no split '{name}'", "--split", closest(name, source.splits))
    return name


def first_of(split: "Split", limit: int | None) -> "Split":
    """Return the first `limit` images of a split, or all."""
    import torch

    return split if limit is None or limit >= len(split) else split.take(torch.arange(limit))


def share(value: float | None) -> str:
    """Write a share as a percentage; one of nothing is a dash."""
    return "-" if value is None or value != value else f"{value:.1%}"
