"""Where a command prints: standard output, or standard error if JSON goes to standard output."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdvit.engine.terminal import RunConsole


def make_console(as_json: bool) -> "RunConsole":
    """Return the console of a command. Of several processes only rank 0 prints."""
    from pdvit.engine.terminal import RunConsole

    return RunConsole(stderr=as_json, quiet=os.environ.get("RANK", "0") != "0")


def log(console: "RunConsole", text: str) -> None:
    """Print text without markup, highlighting or wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
