"""Where the time of a run goes, phase by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the seconds of each phase in `spent`; exactly one phase runs at a time.

    On a GPU the time of a step shows up where somebody waits for it: in the step that logs.
    """

    def __init__(self, spent: dict[str, float]) -> None:
        self.spent, self.phase = spent, "start"
        self.begun = self.since = time.perf_counter()

    def enter(self, phase: str) -> None:
        """End the phase that runs, and begin another."""
        now = time.perf_counter()
        if self.phase != "start":
            self.spent[self.phase] = self.spent.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Put another phase between, and then go on with the one that ran."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def running(self) -> float:
        """Return the seconds since the clock was made."""
        return time.perf_counter() - self.begun
