"""Stopping on request: the first signal asks, and the loop stops after the step it is in."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75  # the conventional status for "try again later"

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # the last is Slurm's, before its time limit


class StopRequest:
    """Whether somebody asked the run to stop, and why: the name of a signal, or the time limit."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGUSR1 and a closed terminal (SIGHUP) into a request; a second SIGINT ends at once."""
    request = StopRequest()

    def ask(number: int, _: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.reason = request.reason or signal.Signals(number).name

    wanted = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, ask) for number in wanted}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
