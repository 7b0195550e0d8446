"""The training loop.

Order of events in one step:
    next batch (augmented and mixed on the device)
    forward pass and objective
    backward, clip, update
    only when due: log, evaluate, save
    last: was a stop asked for?
"""

import math
import time
from typing import Any

import torch
from rich.console import Console

from pdvit.config.schema import Config
from pdvit.engine.device import autocast
from pdvit.engine.display import Display
from pdvit.engine.interrupts import StopRequest
from pdvit.engine.protocol import Task
from pdvit.engine.schedule import make_plan, make_scheduler
from pdvit.engine.state import State
from pdvit.engine.update import make_optimizer, update
from pdvit.errors import RunFailed, UserError
from pdvit.tracking import RunDirectory, Status


class Trainer:
    """Trains one task into one run directory."""

    def __init__(self, task: Task, config: Config, device: torch.device) -> None:
        """Prepare everything that can fail before a run directory exists; raises UserError."""
        self.task, self.config, self.device = task, config, device
        self.plan = make_plan(config, task.steps_per_epoch, task.batch_size)
        optimizer = make_optimizer(task.module, config.optim)
        self.scheduler = make_scheduler(optimizer, config, self.plan)
        self.state = State(task.module, optimizer, device)

    def restore(self, directory: RunDirectory) -> None:
        """Take up a run where its last checkpoint left it, or at its start; raises UserError for a damaged one."""
        self.state.restore(directory.path / "checkpoints")
        directory.cut_records(self.state.progress.step)

    def run(self, directory: RunDirectory, console: Console, stop: StopRequest) -> dict[str, Any] | None:
        """Train to the end and return the summary; None where a stop was asked for.

        Raises UserError or RunFailed; the run directory then says `failed`, and can be resumed.
        """
        self.directory = directory
        directory.status("running", step=self.state.progress.step)
        try:
            with Display(console, self.plan.steps, self.state.progress.step) as self.display:
                return self._finish() if self._train(stop) else None
        except BaseException as error:
            self._fail(error)
            raise

    def _train(self, stop: StopRequest) -> bool:
        """Run the steps; False where a stop was asked for before the last."""
        plan, state, progress = self.plan, self.state, self.state.progress
        self.since = time.perf_counter()
        self.logged = (progress.samples, progress.seconds)
        if progress.step >= plan.steps:
            return True
        for batch in self.task.batches(progress.step):
            self.scheduler.step_update(progress.step)
            state.module.train()
            with autocast(self.device, self.config.run.precision):
                output = self.task.step(batch)
            norm = update(output.loss, state.module, state.optimizer, self.config.optim.clip_grad)
            progress.step += 1
            progress.samples += self.task.batch_size
            state.meter.add(output.metrics | {"grad_norm": norm})
            last = progress.step == plan.steps
            if last or progress.step % plan.log_every == 0:
                self._log()
            if last or progress.step % plan.eval_every == 0:
                self._evaluate()
            if last or stop or progress.step % plan.save_every == 0:
                self._save()
            if last:
                return True
            if stop:
                self.directory.status("stopped", step=progress.step, reason=stop.signal)
                return False
        raise AssertionError("a task's batches never end")

    def _log(self) -> None:
        """Write the means since the last record; stop where they are no numbers."""
        progress, lr = self.state.progress, self.state.optimizer.param_groups[0]["lr"]
        means = self.state.meter.read()  # waits for the device, so the clock below has all of its work
        self._tick()
        samples, seconds = self.logged
        rate = (progress.samples - samples) / max(progress.seconds - seconds, 1e-9)
        self.logged = (progress.samples, progress.seconds)
        record = {"step": progress.step, "epoch": self._epoch(), **means, "lr": float(lr)}
        self.directory.append("train", record, {"seconds": progress.seconds, "images_per_second": rate})
        shown = {name: value for name, value in means.items() if name != "grad_norm"}
        epoch = f"epoch {math.ceil(self._epoch())}/{math.ceil(self.plan.steps / self.plan.steps_per_epoch)}"
        self.display.show(progress.step, epoch, rate, shown)
        self._refuse([name for name, value in means.items() if not math.isfinite(value)])

    def _check_sound(self) -> None:
        """End the run before it measures or saves what is broken, so that the last sound checkpoint stays."""
        sums = self.state.meter.sums
        self._refuse([name for name, total in sums.items() if not math.isfinite(float(total))])
        weights = self.state.module.named_parameters()
        self._refuse([name for name, weight in weights if not bool(weight.isfinite().all())][:3])

    def _refuse(self, broken: list[str]) -> None:
        if broken:
            raise RunFailed(
                f"{', '.join(broken)} became infinite or not a number by step {self.state.progress.step}",
                "start a new run with a lower --lr, or with --clip-grad 1",
            )

    def _evaluate(self) -> None:
        progress = self.state.progress
        self._check_sound()
        self._tick()
        records, headline = self.task.evaluate()
        for kind, record in records.items():
            self.directory.append(kind, {"step": progress.step, "epoch": self._epoch(), **record})
        value = records["eval"][self.task.best_metric]
        if math.isfinite(value) and (progress.best is None or value > progress.best):
            progress.best, progress.best_step = value, progress.step
        self.display.say(f"epoch {self._epoch():>4.4g}  {headline}")
        self.since = time.perf_counter()

    def _save(self) -> None:
        self._check_sound()
        self._tick()
        try:
            self.state.save(self.directory.path / "checkpoints", self.config.checkpoint.keep)
        except OSError as error:
            raise UserError(
                f"the checkpoint can't be written: {error.strerror or error}",
                str(self.directory.path / "checkpoints"),
                "make room, then go on with --resume",
            ) from error
        self.directory.status("running", step=self.state.progress.step, best=self._best())
        self.since = time.perf_counter()

    def _tick(self) -> None:
        """Bring the training clock up to now; evaluating and saving do not count."""
        now = time.perf_counter()
        self.state.progress.seconds += now - self.since
        self.since = now

    def _epoch(self) -> float:
        return round(self.state.progress.step / self.plan.steps_per_epoch, 4)

    def _best(self) -> dict[str, Any]:
        return {self.task.best_metric: self.state.progress.best, "step": self.state.progress.best_step}

    def _finish(self) -> dict[str, Any]:
        """Export the weights, measure them, and close the run."""
        progress = self.state.progress
        numbers, files = self.task.finish()
        for name, content in files.items():
            self.directory.write(name, content)
        summary = {
            **numbers,
            "epochs": self._epoch(),
            "steps": progress.step,
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(progress.samples / max(progress.seconds, 1e-9), 1),
        }
        self.directory.write_json("summary.json", summary)
        self.directory.status("finished", step=progress.step, best=self._best())
        return summary

    def _fail(self, error: BaseException) -> None:
        """Mark the run; a broken disk must not hide the error that came first."""
        status: Status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = error.what if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: {error}"
        try:
            self.directory.status(status, step=self.state.progress.step, reason=reason)
        except UserError as second:
            error.add_note(f"and status.json could not be written: {second.what}")
