"""What one command that trains has of its own, and what one kind of task brings to all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pdvit.config.schema import Config

if TYPE_CHECKING:
    import torch

    from pdvit.data.sources import Source
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.protocol import Task


class MakeTask(Protocol):
    """Builds what is trained from a resolved configuration, its data and where it runs."""

    def __call__(self, config: Config, source: "Source", device: "torch.device", ranks: "Ranks") -> "Task":
        """Return the task; raises UserError."""


def anything(config: Config) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Kind:
    """A kind of task: its data, what is trained on them, and what is said before the first step and after the last."""

    open_source: Callable[[Config, Callable[[str], None]], "Source"]
    """Open the data of a configuration; raises UserError."""
    settle: Callable[[Config, int, "torch.device"], Config]
    """Fill in what depends on the number of processes and their devices; raises UserError."""
    make_task: MakeTask
    describe: Callable[[Config, Any], str]
    """Say in a line or two what is trained, from the configuration and the task."""
    conclude: Callable[[Mapping[str, Any]], str]
    """Say in a line what came out, from the summary."""
    use: Callable[[Path], str]
    """Say how the weights in a run directory are used."""


@dataclass(frozen=True)
class Command:
    """A command that trains: its name, and how it tells which kind of task a configuration asks for.

    It can be pickled, for the processes of a sweep.
    """

    name: str
    kind_of: Callable[[Config], Kind]
    check: Callable[[Config], None] = anything
    """Raise UserError where a new run lacks what only this command asks for."""

    def __call__(self, *arguments: str) -> str:
        """Return the command as one would type it."""
        return " ".join(("pdvit", self.name, *arguments))
