"""Draw what a command prints in a terminal: python docs/terminal.py OUT.svg pdvit analyze runs/digits-none

Progress bars are left out, since they are erased at the end.
"""

import os
import pty
import re
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 96


def run_in_terminal(command: list[str]) -> str:
    """Return what a command leaves on a terminal of `COLUMNS` columns."""
    os.environ |= {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    received = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1024)
        received.extend(data)
        return data

    if status := pty.spawn(command, read):
        sys.exit(os.waitstatus_to_exitcode(status))
    lines = received.decode().replace("\r\n", "\n").split("\n")
    lines = [re.split(r"\x1b\[2K|\r", line)[-1] for line in lines]
    return "\n".join(line for line in lines if "━" not in line).strip()


if __name__ == "__main__":
    path, *command = sys.argv[1:]
    printed = run_in_terminal(command)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text(f"$ {shlex.join(command)}", style="bold"))
        console.print(Text.from_ansi(re.sub(r"\x1b\[\?25[lh]", "", printed)), "", sep="\n")
        picture = console.export_svg(title="", clear=False)
    # The fonts of the reader instead of one from the network.
    picture = re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL)
    Path(path).write_text(picture.replace("Fira Code", "ui-monospace, Menlo, DejaVu Sans Mono"), encoding="utf-8")
