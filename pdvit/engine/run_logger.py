"""Records of a run while it trains: metrics.jsonl, trackers, status.json, the display, phase times and traces."""

import math
import os
import resource
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function

from pdvit.engine.schedule import StepSchedule
from pdvit.engine.state import Progress
from pdvit.engine.terminal import Display
from pdvit.tracking.run_directory import RunDirectory, Status
from pdvit.tracking.trackers import Trackers


@dataclass
class RunLogger:
    """Writes records, status and display of a run, and adds up the seconds of its phases."""

    directory: RunDirectory
    console: Console
    progress: Progress
    steps: StepSchedule
    best_metric: str
    device: torch.device
    trackers: Trackers | None = None

    def __post_init__(self) -> None:
        self.display = Display(self.console, self.steps.total, self.progress.step)
        # If not, the length was given in steps, and the output counts steps.
        self.in_epochs = self.steps.total % self.steps.per_epoch == 0
        self.phase, self.since = "", time.perf_counter()
        self.logged = (self.progress.samples, dict(self.progress.seconds_by_phase))

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return round(self.progress.step / self.steps.per_epoch, 4)

    def start(self, phase: str) -> None:
        """End the current phase and start another. On a GPU the step that logs waits for those before it."""
        now, seconds = time.perf_counter(), self.progress.seconds_by_phase
        if self.phase:
            seconds[self.phase] = seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def log_train(self, means: Mapping[str, float], skipped: int, lr: float) -> None:
        """Write the means since the last such record, with the rate and the seconds by phase."""
        progress, (samples, seconds) = self.progress, self.logged
        passed = {phase: value - seconds.get(phase, 0.0) for phase, value in progress.seconds_by_phase.items()}
        rate = (progress.samples - samples) / max(passed.get("data", 0.0) + passed.get("step", 0.0), 1e-9)
        self.logged = (progress.samples, dict(progress.seconds_by_phase))
        # So far, of the GPU or else of this process, which Linux counts in KiB.
        on_gpu, process = self.device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF)
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if on_gpu else process.ru_maxrss / 2**10
        timing = {"seconds": progress.seconds, "images_per_second": rate, "peak_memory_mb": peak}
        self.log("train", {**means, "skipped": skipped, "lr": lr}, timing | passed)
        metrics = {name: value for name, value in means.items() if name != "grad_norm"}
        metrics |= {"skipped": progress.skipped} if progress.skipped else {}
        epoch = f"epoch {math.ceil(self.epoch)}/{self.steps.total // self.steps.per_epoch}"
        self.display.show(progress.step, epoch if self.in_epochs else "", rate, metrics)

    def write_status(self, status: Status, **details: Any) -> None:
        """Write status.json: the step and the best evaluation."""
        best = {self.best_metric: self.progress.best, "step": self.progress.best_step}
        self.directory.write("status.json", {"status": status, "step": self.progress.step, "best": best, **details})

    def log(self, record_type: str, metrics: Mapping[str, Any], timing: Mapping[str, float] | None = None) -> None:
        """Write a record into metrics.jsonl and to the trackers."""
        record = {"kind": record_type, "step": self.progress.step, "epoch": self.epoch, **metrics}
        record |= {"time": timing} if timing else {}  # apart, because it differs between two runs of one recipe
        self.directory.append(record)
        self.progress.records += 1
        if self.trackers:
            self.trackers.log(record)


def profile_steps(batches: Generator[Any], start: int, steps: range, folder: Path, suffix: str) -> Generator[Any]:
    """Yield the batches of steps start, start + 1, ... and write a trace of `steps` for a trace viewer."""
    traced = range(max(start, steps.start), steps.stop)
    folder.mkdir(parents=True, exist_ok=True)
    write = methodcaller("export_chrome_trace", str(folder / f"steps-{traced.start}-{steps.stop}{suffix}.json"))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its library reports harmless events to stderr
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with closing(batches):
        yield from islice(batches, traced.start - start)
        # There is one cycle only; unless its events are kept, torch 2.11 warns that others would be lost.
        with profile(activities=activities, on_trace_ready=write, record_shapes=True, acc_events=True):
            for step in traced:
                with record_function(f"step {step}"):
                    yield next(batches)
        yield from batches
