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
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.theme import Theme

from pdvit.config.duration import describe_duration

PLAIN_SECONDS = 10.0  # between two lines where there is no progress bar
BAR, INDENT = 20, 11  # widths: the bar, and the columns before the metrics of an evaluation
EXIT_STOPPED = 75  # the conventional status for "try again later"
# Slurm can send one of the last two before its time limit; submitit asks for SIGUSR2, as NCCL may use the other.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
T = TypeVar("T")
ACCENT = dict.fromkeys(("accent", "bar.complete", "bar.finished", "bar.pulse"), "cyan")  # the colour of the help too
THEME = Theme(ACCENT | dict.fromkeys(("progress.percentage", "progress.remaining"), "none"))


class RunConsole(Console):
    """A console that goes silent when its reader is gone (`| head`, a closed terminal), so that the run continues."""

    def __init__(self, **options: Any) -> None:
        super().__init__(theme=THEME, **options)

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
        self.console, self.total, self.unit, self.last_line = console, total, unit, time.monotonic()
        self.first: tuple[int, float] | None = None  # the first step that was shown, and when
        fixed, rest = Column(no_wrap=True, max_width=40), Column(no_wrap=True, ratio=1)  # the width that is left
        name, speed = (TextColumn(f"{{task.{key}}}", table_column=fixed) for key in ("description", "fields[rate]"))
        metrics = TextColumn("{task.fields[metrics]}", table_column=rest)
        columns, self.plain = (name, BarColumn(BAR), TaskProgressColumn(), speed, metrics), not console.is_terminal
        self.bar = Progress(*columns, console=console, transient=True, expand=True, disable=self.plain)
        self.task = self.bar.add_task("starting", total=total, completed=start, rate="", metrics="")

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the terminal may be gone
            self.bar.stop()

    def show(self, step: int, label: str, rate: float, metrics: Mapping[str, float]) -> None:
        """Show a label, the step, images per second, the time left, and the latest means.

        A bar shows the step only if there is no label, and as many of the means as fit. The time left is known from the
        second call on: until the first, the run also starts.
        """
        now, steps = time.monotonic(), f"{self.unit} {step}/{self.total}"
        self.first = first, began = self.first or (step, now)
        names = sorted(metrics, key=lambda name: name not in ("loss", "skipped"))
        texts, speed = [f"{name} {metrics[name]:.3g}" for name in names], describe_rate(rate)
        if step > first:
            speed += f", {describe_duration((now - began) / (step - first) * (self.total - step))} left"
        if not self.plain:
            name = label or steps
            room = self.console.width - len(f"{name} {' ' * BAR} 100% {speed} ")
            while len(" ".join(texts)) > room:
                texts.pop()
            self.bar.update(self.task, completed=step, description=name, rate=speed, metrics=" ".join(texts))
        elif now - self.last_line >= PLAIN_SECONDS:
            self.last_line = now
            self.log(", ".join(filter(None, (f"{label} {steps}".lstrip(), speed, " ".join(texts)))))

    def log(self, text: str) -> None:
        """Print lines that stay, warnings in colour; of an evaluation, P is below the metrics if they are too long."""
        for line in text.split("\n"):
            style = "yellow" if line.startswith("warning") else None
            if not self.plain and len(line) > self.console.width:
                line = line.replace("  P ", f"\n{' ' * INDENT}P ")
            self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=self.plain)


def describe_rate(rate: float) -> str:
    """Return images per second as text; below one, seconds per image."""
    return f"{1 / rate:,.1f} s/img" if 0 < rate < 1 else f"{rate:,.{0 if rate >= 10 else 1}f} img/s"


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


def raise_on_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt: there is work to clean up. Since the command's start it ended the process."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_on_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Turn the signals in STOPPING into a request; a second SIGINT ends at once."""
    request = StopRequest() if request is None else request
    raise_on_ctrl_c()  # from the end of this context on

    def handle(number: int, _: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not request and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # not by print, which the signal may have interrupted
                start = "\r\x1b[2K" if os.isatty(2) else "\n"  # erases a progress bar, which is drawn again below
                os.write(2, f"{start}{signal.Signals(number).name}: stopping ...\n".encode())
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
