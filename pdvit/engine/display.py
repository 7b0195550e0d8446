"""What a run shows while it works: a progress bar on a terminal, a plain line now and then elsewhere."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


class RunConsole(Console):
    """A console whose reader may go away (`| head`, a closed terminal): the run then goes on in silence."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; a terminal that is gone is no error."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Stop writing, where rich would end the process."""
        self.quiet = True
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Display:
    """Shows how far something is (in steps, or another `unit`), its rate, the time left and the latest numbers."""

    def __init__(self, console: Console, total: int, start: int = 0, unit: str = "step") -> None:
        self.console, self.total, self.unit = console, total, unit
        self.bar: Progress | None = None
        self.begun, self.start, self.last_line = time.monotonic(), start, time.monotonic()
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task("starting", total=total, completed=start, rate="", numbers="")

    def __enter__(self) -> "Display":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            with suppress(OSError):  # the terminal may be gone
                self.bar.stop()

    def show(self, step: int, epoch: str, rate: float, numbers: Mapping[str, float]) -> None:
        """Show where the run is, images per second, and the latest means."""
        text = " ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        pace = f"{rate:,.0f} img/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=epoch, rate=pace, numbers=text)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            left = (self.last_line - self.begun) / max(1, step - self.start) * (self.total - step)
            numbers_text = f", {text}" if text else ""
            self.say(f"{epoch} {self.unit} {step}/{self.total}, {pace}, {left:.0f} s left{numbers_text}")

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
