"""A trace of chosen steps, for a trace viewer."""

import os
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from pdvit.engine.distributed import Ranks


class Profiler:
    """Records the steps of a range; writes profile/steps-FROM-TO.json when they are done."""

    def __init__(self, steps: range, folder: Path, ranks: Ranks) -> None:
        self.steps, self.folder, self.ranks = steps, folder, ranks
        self.running: profile | None = None

    def __enter__(self) -> "Profiler":
        return self

    def enter(self, step: int) -> None:
        """Note that a step begins (counted from 1)."""
        if self.running is None and step in self.steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its library reports to stderr what is no trouble
            # There is one cycle only; without keeping its events torch 2.11 warns that others would be lost.
            self.running = profile(activities=activities, record_shapes=True, acc_events=True)
            self.running.start()
            self.first = step
        elif self.running is not None and step not in self.steps:
            self._write(step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running is not None:
            self._write(self.steps.stop)

    def _write(self, end: int) -> None:
        assert self.running is not None
        self.running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self.first}-{end}" + (f"-rank-{self.ranks.rank}" if self.ranks.world_size > 1 else "")
        self.running.export_chrome_trace(str(self.folder / f"{name}.json"))
        self.running = None
