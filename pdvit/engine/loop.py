"""The training loop.

Order of events in one step:
    next batch (augmented and mixed on the device)
    forward pass and objective, backward, part by part
    clip; update, only where loss and gradient are finite; moving average
    only when due: log, evaluate, save
    last: was a stop asked for?
"""

import math
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from rich.console import Console
from torch.amp import GradScaler

from pdvit.config.load import to_dict
from pdvit.config.schema import Config
from pdvit.engine.checkpoints import Checkpoints
from pdvit.engine.clock import Clock
from pdvit.engine.device import peak_memory
from pdvit.engine.display import Display
from pdvit.engine.interrupts import StopRequest
from pdvit.engine.memory import fits, is_out_of_memory, largest
from pdvit.engine.profiler import Profiler
from pdvit.engine.protocol import Batch, Task
from pdvit.engine.ranks import Agreement, Ranks, lost_another
from pdvit.engine.recipe import check_data, check_recipe
from pdvit.engine.replay import share_of, write_bundle
from pdvit.engine.schedule import make_plan, make_scheduler
from pdvit.engine.spread import local, make_average, spread
from pdvit.engine.state import State
from pdvit.engine.update import Meter, Updater, make_optimizer, skips_on_device
from pdvit.errors import RunFailed, UserError
from pdvit.tracking import RunDirectory, Sinks, Status, open_sinks, tracker_names

# Skipped steps in a row after which a run stops.
# A float16 run first has to find its loss scale: 65,536, halved each time.
PATIENCE, PATIENCE_FP16 = 5, 25


class Trainer:
    """Trains one task into one run directory."""

    def __init__(self, task: Task, config: Config, device: torch.device, ranks: Ranks) -> None:
        """Prepare everything that can fail before a run directory exists; raises UserError."""
        self.task, self.config, self.device, self.ranks = task, config, device, ranks
        self.plan = make_plan(config, task.steps_per_epoch, task.batch_size)
        if config.run.compile and ranks.size > 1:
            what = "a step that several processes share can't be compiled yet"
            raise UserError(what, "run.compile (--compile)", "leave it out, or train in one process")
        average = make_average(task.module, config.optim.ema_decay)
        self.network = spread(task.module, average, config.run.distribute, ranks, device)
        optimizer = make_optimizer(task.module, config.optim)
        self.scheduler = make_scheduler(optimizer, config, self.plan)
        scaler = GradScaler(device.type, enabled=config.run.precision == "fp16")
        self.updater = Updater(task, self.network, optimizer, scaler, average, config, ranks, device)
        recipe, meter = to_dict(config), Meter(device)
        self.state = State(
            task.module, optimizer, scaler, average, meter, device, ranks, recipe, dict(task.fingerprint)
        )
        self.batch: Batch | None = None
        self.weights = "raw" if average is None else "ema"
        self.evaluated = task.module if average is None else average.module

    def notes(self) -> list[str]:
        """Return what somebody should know before the start."""
        if skips_on_device(self.state.optimizer):
            return []
        return [f"note: {self.config.optim.opt} can't skip a bad step on the device, so every update waits for it once"]

    def restore(self, directory: RunDirectory, changed: Mapping[str, Any]) -> None:
        """Take up a run where its last checkpoint left it, or at its start.

        `changed` holds the keys that were changed on purpose since the checkpoint, with their values. Raises UserError
        where the checkpoint is damaged, or of other data or another recipe.
        """
        where = str(directory.path)

        def check(facts: dict[str, Any]) -> None:
            check_recipe(facts.get("config"), self.state.config, changed, where)
            check_data(facts.get("data"), self.state.data, where)

        self._checkpoints(directory).restore(self.state, check)
        if self.state.progress.step > self.plan.steps:
            raise UserError(
                f"{self.state.progress.step} steps are done already, of {self.plan.steps}",
                "optim.epochs",
                "make the run longer than what is done",
            )
        directory.cut_records(self.state.progress.step)

    def run(self, directory: RunDirectory, console: Console, stop: StopRequest) -> dict[str, Any] | None:
        """Train to the end and return the summary; None where a stop was asked for.

        Raises UserError or RunFailed; the run directory then says `failed`, and can be resumed.
        """
        self.directory, self.checkpoints = directory, self._checkpoints(directory)
        self.sinks = Sinks([], print)
        directory.status("running", step=self.state.progress.step)
        try:
            with Display(console, self.plan.steps, self.state.progress.step) as self.display:
                self.sinks = self._open_sinks()
                done = self._train(stop)
                self.checkpoints.wait()
                return self._finish() if done else None
        except BaseException as error:
            try:
                explained = self._explain(error)
            except BaseException:
                self._fail(error)
                raise
            self._fail(explained)
            if explained is error:
                raise
            raise explained from error
        finally:
            self.sinks.close()

    def _open_sinks(self) -> Sinks:
        """Open the trackers; only a new run insists on them."""
        step = self.state.progress.step
        names = tracker_names(self.config.run.track) if self.ranks.main else []
        warn = self.display.say if step else None
        return Sinks(open_sinks(names, self.directory.path, self.state.config, step, warn), self.display.say)

    def _train(self, stop: StopRequest) -> bool:
        """Run the steps; False where a stop was asked for before the last."""
        plan, state, progress = self.plan, self.state, self.state.progress
        self.clock, agreement = Clock(progress.spent), Agreement(self.ranks)
        self.logged, self.saved, self.owed = (progress.samples, dict(progress.spent)), 0.0, False
        if progress.step >= plan.steps:
            return True
        profile = Profiler(plan.profile, self.directory.path / "profile", self.ranks)
        with profile as profiler, closing(self.task.batches(progress.step)) as batches:
            self.clock.enter("data")
            for batch in self._or_save(batches):
                self.clock.enter("step")
                self.batch = batch
                profiler.enter(progress.step + 1)
                self.scheduler.step_update(progress.step)
                generators = state.generators()
                metrics, skipped = self.updater(batch, progress.step + 1)
                state.meter.add(metrics, skipped)
                progress.step += 1
                progress.samples += self.task.batch_size
                if plan.due(plan.log_every, progress.step):
                    self._log(batch, generators)
                better = plan.due(plan.eval_every, progress.step) and self._evaluate()
                stopping, by_clock = agreement.any(self._should_stop(stop), self._save_is_due())
                wanted = stopping or by_clock or self.owed or (better and self.config.checkpoint.best)
                if wanted or plan.due(plan.save_every, progress.step) or plan.at_milestone(progress.step):
                    self._save(better and self.config.checkpoint.best)
                if progress.step >= plan.steps:
                    return True
                if stopping:
                    self._stopped(stop)
                    return False
                self.clock.enter("data")
        raise AssertionError("a task's batches never end")

    def _or_save(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Hand on the batches; where an image can't be read, save first: everything before it is sound."""
        try:
            yield from batches
        except UserError:
            if self.ranks.size == 1 and self.state.progress.step:
                self._save(best=False)
            raise

    def _log(self, batch: Batch, generators: dict[str, torch.Tensor]) -> None:
        """Write the means since the last record; stop where one step after another had to be skipped."""
        progress, groups = self.state.progress, self.state.optimizer.param_groups
        lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in groups)  # before layer decay
        means, skipped, in_a_row = self.state.meter.read(self.ranks)
        self.clock.enter("step")  # reading waited for the device, so the clock now has all of its work
        progress.skipped += skipped
        samples, spent = self.logged
        passed = {phase: seconds - spent.get(phase, 0.0) for phase, seconds in progress.spent.items()}
        rate = (progress.samples - samples) / max(passed.get("data", 0.0) + passed.get("step", 0.0), 1e-9)
        self.logged = (progress.samples, dict(progress.spent))
        record = {"step": progress.step, "epoch": self._epoch(), **means, "skipped": skipped, "lr": float(lr)}
        timing = {"seconds": progress.seconds, "images_per_second": rate, "peak_memory_mb": peak_memory(self.device)}
        self._record("train", record, timing | passed)
        shown = {name: value for name, value in means.items() if name != "grad_norm"}
        shown |= {"skipped": progress.skipped} if progress.skipped else {}
        epoch = f"epoch {math.ceil(self._epoch())}/{math.ceil(self.plan.steps / self.plan.steps_per_epoch)}"
        self.display.show(progress.step, epoch, rate, shown)
        if in_a_row >= (PATIENCE_FP16 if self.updater.scaler.is_enabled() else PATIENCE):
            self._give_up(batch, generators, in_a_row)

    def _record(self, kind: str, record: dict[str, Any], clock: dict[str, float] | None = None) -> None:
        """Write a record to metrics.jsonl, and send it to the trackers."""
        self.directory.append(kind, record, clock)
        self.sinks.log(kind, self.state.progress.step, record, clock)

    def _give_up(self, batch: Batch, generators: dict[str, torch.Tensor], in_a_row: int) -> None:
        snapshot, shares = self.state.snapshot(), self.ranks.gather(share_of(batch, generators))
        if self.ranks.main:
            write_bundle(self.directory.path, snapshot, shares)
        self.ranks.gather(None)  # torchrun ends the others as soon as one is done
        raise RunFailed(
            f"loss or gradient was infinite or not a number in {in_a_row} steps in a row, up to step {snapshot.step}",
            f"see where: pdvit train --replay {self.directory.path}; then start a new run with a lower --lr, or with "
            f"--clip-grad 1",
        )

    def _explain(self, error: BaseException) -> BaseException:
        """Return the error that says what to do, for those of torch that don't."""
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold the step's activations
            return self._out_of_memory()
        if lost_another(error):
            tip = f"its own message says why; go on with: --resume {self.directory.path}"
            return RunFailed("another process of the run does not answer any more", tip)
        return error

    def _out_of_memory(self) -> RunFailed:
        """Find out what would fit, and say it."""
        most = min(self.updater.micro_batch, self.task.batch_size // self.ranks.size)
        batch = self.batch
        if batch is None or self.ranks.size > 1:  # a trial would mix with what the other processes still exchange
            tip = f"go on in parts: --resume {self.directory.path} --change data.micro_batch={max(1, most // 2)}"
            return RunFailed(f"{self.device} has no memory left", tip)
        self.state.optimizer.zero_grad(set_to_none=True)
        size = largest(lambda size: fits(self.updater, batch, size), most // 2)
        where = f"--resume {self.directory.path} --change data.micro_batch={size}"
        return RunFailed(
            f"{self.device} has no memory for {most} images at a time",
            f"{size} fit; the same batches in parts: pdvit train {where}"
            if size
            else "no single image fits: use a smaller model or image, --grad-checkpointing or --precision bf16",
        )

    def _check_weights(self) -> None:
        """End the run before it measures or saves broken weights, so that the last sound checkpoint stays."""
        weights = list(self.state.module.named_parameters())
        unsound = self.ranks.sum(torch.stack([(~local(weight).isfinite()).any() for _, weight in weights]).int())
        if bool(unsound.any()):
            broken = [name for (name, _), count in zip(weights, unsound.tolist(), strict=True) if count]
            raise RunFailed(
                f"{', '.join(broken[:3])} became infinite or not a number by step {self.state.progress.step}",
                "start a new run with a lower --lr, or with --clip-grad 1",
            )

    def _evaluate(self) -> bool:
        """Measure the held-out images; True where the best number so far came out."""
        progress = self.state.progress
        with self.clock.during("evaluate"):
            self._check_weights()
            records, headline = self.task.evaluate(self.evaluated)
        for kind, record in records.items():
            self._record(kind, {"step": progress.step, "epoch": self._epoch(), **record})
        self.display.say(f"epoch {self._epoch():>4.4g}  {headline}")
        value = records["eval"][self.task.best_metric]
        better = math.isfinite(value) and (progress.best is None or value > progress.best)
        if better:
            progress.best, progress.best_step = value, progress.step
        return better

    def _save_is_due(self) -> bool:
        """Tell whether it is time to save by the clock, or to find out that saving came to grief."""
        seconds = self.plan.save_seconds
        by_clock = seconds is not None and self.clock.running() - self.saved >= seconds
        return by_clock or self.checkpoints.failed()

    def _should_stop(self, stop: StopRequest) -> bool:
        if self.plan.time_limit is not None and self.clock.running() >= self.plan.time_limit:
            stop.reason = stop.reason or "time limit"
        return bool(stop)

    def _save(self, best: bool) -> None:
        self.owed = bool(self.state.meter.in_a_row > 0)
        if self.owed:  # the run may be broken: keep the checkpoint from before, and save when it has recovered
            return
        with self.clock.during("save"):
            self._check_weights()
            snapshot = self.state.snapshot()
            if self.ranks.main:
                self.checkpoints.save(snapshot, best)
        self.saved = self.clock.running()
        self.directory.status("running", step=snapshot.step, best=self._best())

    def _stopped(self, stop: StopRequest) -> None:
        self.checkpoints.wait()
        self.directory.status("stopped", step=self.state.progress.step, best=self._best(), reason=stop.reason)
        self.ranks.gather(None)  # torchrun ends the others as soon as one is done

    def _checkpoints(self, directory: RunDirectory) -> Checkpoints:
        return Checkpoints(directory.path / "checkpoints", self.config.checkpoint.keep, self.plan.milestone)

    def _epoch(self) -> float:
        return round(self.state.progress.step / self.plan.steps_per_epoch, 4)

    def _best(self) -> dict[str, Any]:
        return {self.task.best_metric: self.state.progress.best, "step": self.state.progress.best_step}

    def _finish(self) -> dict[str, Any]:
        """Export the weights, measure them, and close the run."""
        progress, tensors = self.state.progress, self.state.snapshot().tensors
        numbers = self.task.finish(self.evaluated, self.weights)
        if self.ranks.main:
            for name, content in self.task.export(tensors.get("ema", tensors["module"]), self.weights).items():
                self.directory.write(name, content)
        summary = {
            **numbers,
            "epochs": self._epoch(),
            "steps": progress.step,
            "steps_skipped": progress.skipped,
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(progress.samples / max(progress.seconds, 1e-9), 1),
            "seconds_by_phase": {phase: round(seconds, 3) for phase, seconds in progress.spent.items()},
        }
        self.directory.write_json("summary.json", summary)
        self.directory.status("finished", step=progress.step, best=self._best())
        return summary

    def _fail(self, error: BaseException) -> None:
        """Mark the run; a broken disk must not hide the error that came first."""
        status: Status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = error.what if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: {error}"
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else reason
        for leave in (
            self.checkpoints.wait,  # what was begun before the error is sound
            lambda: self.directory.status(status, step=self.state.progress.step, best=self._best(), reason=reason),
        ):
            try:
                leave()
            except UserError as second:
                error.add_note(f"and {second.what}")
