"""The terminal of a command: its output, the progress of a run, and the signals that stop it. Imports no torch."""

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between two lines where there is no progress bar
EXIT_STOPPED = 75  # the conventional status for "try again later"
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # Slurm sends the last before its time limit
T = TypeVar("T")


class RunConsole(Console):
    """A console that goes silent when its reader is gone (`| head`, a closed terminal), so that the run continues."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; ignore a terminal that is gone."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Stop writing. Rich would end the process."""
        self.quiet = True
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Display:
    """Progress in steps (or another `unit`), rate, time left and the latest metrics: a bar, or plain lines."""

    def __init__(self, console: Console, total: int, start: int = 0, unit: str = "step") -> None:
        self.console, self.total, self.start, self.unit = console, total, start, unit
        self.started = self.last_line = time.monotonic()
        texts = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[rate]", "fields[metrics]")]
        columns = texts[0], BarColumn(bar_width=20), TaskProgressColumn(), texts[1], TimeRemainingColumn(), texts[2]
        self.bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        if self.bar:
            self.task = self.bar.add_task("starting", total=total, completed=start, rate="", metrics="")

    def __enter__(self) -> "Display":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the terminal may be gone
            if self.bar:
                self.bar.stop()

    def show(self, step: int, epoch: str, rate: float, metrics: Mapping[str, float]) -> None:
        """Show the step, images per second, and the latest means."""
        text, rate_text = " ".join(f"{name} {value:.3g}" for name, value in metrics.items()), f"{rate:,.0f} img/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=epoch, rate=rate_text, metrics=text)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / max(1, step - self.start) * (self.total - step)
            suffix = f", {text}" if text else ""
            self.log(f"{epoch} {self.unit} {step}/{self.total}, {rate_text}, {left:.0f} s left{suffix}")

    def log(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Stopped(BaseException):
    """Leaves work that can be done again, because the command was asked to stop."""


@dataclass
class StopRequest:
    """Whether the command was asked to stop, and why: the name of a signal, or the time limit."""

    reason: str | None = None
    created: float = field(default_factory=time.monotonic)  # as the command starts: the time limit counts from here
    leave: bool = False  # whether a signal raises Stopped at once

    def __bool__(self) -> bool:
        return self.reason is not None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise Stopped inside at a signal, or now if there was one. For work that can be left at any line."""
        before, self.leave = self.leave, True
        try:
            if self:
                raise Stopped
            yield
        finally:
            self.leave = before

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items until there is a request, which also ends the wait for the next."""
        waiting = iter(items)
        with suppress(Stopped, StopIteration):
            while True:
                with self.interruptible():
                    item = next(waiting)
                yield item


@contextmanager
def stop_on_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGUSR1 and a closed terminal (SIGHUP) into a request; a second SIGINT ends at once."""
    request = StopRequest() if request is None else request

    def handle(number: int, _: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not request and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # not by print, which the signal may have interrupted
                os.write(2, f"\n{signal.Signals(number).name}: stopping ...\n".encode())
        request.reason = request.reason or signal.Signals(number).name
        if request.leave:
            raise Stopped

    handled = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
