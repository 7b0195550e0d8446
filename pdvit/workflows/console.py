"""Where a command prints: standard output, or standard error if JSON goes to standard output."""

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from time import monotonic, sleep
from typing import TYPE_CHECKING, TypeVar

import typer

from pdvit.errors import RunFailed, UserError, printable

if TYPE_CHECKING:
    from pdvit.engine.terminal import RunConsole

Batches = TypeVar("Batches", bound=Sized)


def make_console(as_json: bool, quiet: bool = False) -> "RunConsole":
    """Return the console of a command; its `stderr` is set if the command prints JSON. Only rank 0 prints."""
    from pdvit.engine.terminal import RunConsole

    return RunConsole(stderr=as_json, quiet=quiet or os.environ.get("RANK", "0") != "0")


def log(console: "RunConsole", text: str, style: str = "", words: bool = False) -> None:
    """Print text without markup or control characters; in a terminal with rich's `style`, and `error:` in red.

    Lines stay whole, since commands and paths are copied; in a terminal, those of `words` break between words.
    """
    from rich.text import Text

    lines = [printable(line) for line in text.split("\n")]
    if words and console.is_terminal:
        lines = [part for line in lines for part in wrap(line, console.width)]
    shown = Text("\n".join(lines), style)
    shown.highlight_regex("^error:", "bold red")
    console.print(shown, soft_wrap=True)


def wrap(line: str, width: int) -> list[str]:
    """Break a line between words, in a column beside its label; a command to copy stays whole, on a line of its own."""
    if len(line) <= width:
        return [line]
    parts = re.fullmatch(r"( *\w+(?:: |  ) *|)(.*?)((?<=: |  )pdvit .*)?", line)
    label, prose, command = parts.groups()  # type: ignore[union-attr]
    indent = " " * len(label)
    words = textwrap.wrap(prose, max(1, width - len(label)), break_long_words=False, break_on_hyphens=False) or [""]
    return [label + words[0], *(indent + part for part in [*words[1:], *([command] if command else [])])]


def with_progress(batches: "Iterable[Batches]", total: int, console: "RunConsole", what: str) -> "Iterator[Batches]":
    """Yield batches, and show the number of images done, their rate and the time left."""
    from pdvit.engine.terminal import Display, raise_on_ctrl_c

    raise_on_ctrl_c()
    done, begun = 0, monotonic()
    with Display(console, total, unit="image") as display:
        for batch in batches:
            yield batch
            done += len(batch)
            display.show(done, what, done / max(monotonic() - begun, 1e-9), {})


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the process group at the end. Rank 0 prints its errors; those of other ranks are in torchrun's summary."""
    try:
        yield
    except (UserError, RunFailed) as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
            raise
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from error
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()
            sleep(0.1)  # gloo's threads free the last tensors under Python's lock, and would abort at its end
