"""Where the numbers of a run go while it trains: metrics.jsonl, the trackers, status.json and the screen."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

from pdvit.engine.clock import Clock
from pdvit.engine.device import peak_memory
from pdvit.engine.display import Display
from pdvit.engine.schedule import Plan
from pdvit.engine.state import Progress
from pdvit.tracking import RunDirectory, Sinks, Status, open_sinks


class Journal:
    """Writes down how a run goes. Its clock says what the time between two records went into."""

    def __init__(
        self,
        directory: RunDirectory,
        console: Console,
        progress: Progress,
        plan: Plan,
        best_metric: str,
        device: torch.device,
    ) -> None:
        self.directory, self.progress, self.plan = directory, progress, plan
        self.best_metric, self.device = best_metric, device
        self.display = Display(console, plan.steps, progress.step)
        self.clock = Clock(progress.spent)
        self.logged = (progress.samples, dict(progress.spent))
        self.sinks = Sinks([], self.display.say)

    def open_trackers(self, names: list[str], config: Mapping[str, Any]) -> None:
        """Open the trackers; only a new run insists on them."""
        step, say = self.progress.step, self.display.say
        self.sinks = Sinks(open_sinks(names, self.directory.path, config, step, say if step else None), say)

    def close(self) -> None:
        """Close the trackers."""
        self.sinks.close()

    @property
    def epoch(self) -> float:
        """How many epochs are done."""
        return round(self.progress.step / self.plan.steps_per_epoch, 4)

    def train(self, means: Mapping[str, float], skipped: int, lr: float) -> None:
        """Write the means since the last record of this kind, with the rate and the seconds by phase."""
        progress, (samples, spent) = self.progress, self.logged
        passed = {phase: seconds - spent.get(phase, 0.0) for phase, seconds in progress.spent.items()}
        rate = (progress.samples - samples) / max(passed.get("data", 0.0) + passed.get("step", 0.0), 1e-9)
        self.logged = (progress.samples, dict(progress.spent))
        timing = {"seconds": progress.seconds, "images_per_second": rate, "peak_memory_mb": peak_memory(self.device)}
        self._record("train", {**means, "skipped": skipped, "lr": lr}, timing | passed)
        shown = {name: value for name, value in means.items() if name != "grad_norm"}
        shown |= {"skipped": progress.skipped} if progress.skipped else {}
        epoch = f"epoch {math.ceil(self.epoch)}/{math.ceil(self.plan.steps / self.plan.steps_per_epoch)}"
        self.display.show(progress.step, epoch, rate, shown)

    def evaluation(self, records: Mapping[str, Mapping[str, Any]], headline: str) -> None:
        """Write the records of an evaluation, by kind, and show its headline."""
        for kind, record in records.items():
            self._record(kind, record)
        self.display.say(f"epoch {self.epoch:>4.4g}  {headline}")

    def status(self, status: Status, **facts: Any) -> None:
        """Write status.json: where the run is, and the best evaluation."""
        best = {self.best_metric: self.progress.best, "step": self.progress.best_step}
        self.directory.status(status, step=self.progress.step, best=best, **facts)

    def _record(self, kind: str, numbers: Mapping[str, Any], clock: Mapping[str, float] | None = None) -> None:
        record = {"step": self.progress.step, "epoch": self.epoch, **numbers}
        self.directory.append(kind, record, clock)
        self.progress.records += 1
        self.sinks.log(kind, self.progress.step, record, clock)
