"""The training loop. `Trainer.run` has the events of a step in their order."""

import math
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import closing, nullcontext, suppress
from typing import Any

import torch
from rich.console import Console
from timm.utils import ModelEmaV3, distribute_bn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pdvit.config.load import to_dict
from pdvit.config.schema import Config
from pdvit.engine.checkpoint import Checkpoints
from pdvit.engine.distributed import AnyRank, Ranks
from pdvit.engine.protocol import Task, TrainBatch
from pdvit.engine.recipe import check_data, check_recipe
from pdvit.engine.recovery import REPLAY, save_replay, with_advice
from pdvit.engine.run_logger import RunLogger, profile_steps
from pdvit.engine.schedule import make_lr_scheduler, make_step_schedule
from pdvit.engine.state import TrainState
from pdvit.engine.terminal import Stopped
from pdvit.engine.update import Updater, make_optimizer, parallelize
from pdvit.errors import RunFailed, UserError, command
from pdvit.tracking.run_directory import LAST, RunDirectory, Status, read_pointer
from pdvit.tracking.trackers import Trackers

# Skipped steps in a row after which a run fails. A float16 run first halves its loss scale, from 65,536.
MAX_SKIPPED, MAX_SKIPPED_FP16 = 5, 25


class Trainer:
    """Trains one task into one run directory."""

    def __init__(self, task: Task, config: Config, device: torch.device, ranks: Ranks) -> None:
        """Prepare everything that can fail before a run directory exists; raises UserError."""
        self.task, self.config, self.device, self.ranks = task, config, device, ranks
        self.steps = make_step_schedule(config, task.steps_per_epoch, task.batch_size)
        ema = None if config.optim.ema_decay is None else ModelEmaV3(task.module, decay=config.optim.ema_decay)
        self.weights = "raw" if ema is None else "ema"
        self.evaluated: torch.nn.Module = task.module if ema is None else ema.module
        network = parallelize(task, ema, config.run, ranks, device)
        optimizer = make_optimizer(task.module, config.optim)
        self.lr_scheduler = make_lr_scheduler(optimizer, config, self.steps)
        scaler = GradScaler(device.type, enabled=config.run.precision == "fp16")
        self.state = TrainState(
            task.module, optimizer, scaler, ema, device, ranks, to_dict(config), task.fingerprint, anchor=task.anchor
        )
        self.updater = Updater(task, network, self.state, config)
        self.batch: TrainBatch | None = None
        self.saved_at, self.save_owed = time.monotonic(), False
        waits = f"note: {config.optim.opt} can't skip a bad step on the device, so every update waits for it once"
        self.notes = [] if optimizer.defaults.get("fused") else [waits]

    def restore(self, directory: RunDirectory, changed: Mapping[str, Any]) -> list[str]:
        """Load the last checkpoint, if there is one; its recipe may differ in what was `changed`. Returns notes."""

        def check(metadata: dict[str, Any]) -> None:
            check_recipe(metadata["config"], self.state.config, changed, str(directory.path))
            check_data(metadata["data"], self.state.data, str(directory.path))

        Checkpoints(directory.path / "checkpoints").load(self.state, check)
        progress = self.state.progress
        if progress.step > self.steps.total:
            what = f"the run is at step {progress.step} already, of {self.steps.total}"
            raise UserError(what, "optim.epochs", "make the run longer than what is done")
        written, progress.records = progress.records, directory.cut_records(progress.step)
        if progress.records >= written:
            return []
        lost = f"{written} records were written up to step {progress.step}, and {progress.records} are left"
        return [f"warning: metrics.jsonl was cut short: {lost}; the weights are not affected"]

    def run(self, directory: RunDirectory, console: Console) -> dict[str, Any] | None:
        """Train to the end and return the summary, or None if the run was stopped; after an error it can be resumed."""
        steps, state, progress, stop = self.steps, self.state, self.state.progress, self.ranks.stop
        self.directory, keep = directory, self.config.checkpoint.keep
        self.checkpoints = Checkpoints(directory.path / "checkpoints", keep, steps.milestone_every)
        logger = RunLogger(directory, console, progress, steps, self.task.best_metric, self.device)
        self.logger, any_rank = logger, AnyRank(flags=2) if self.ranks.world_size > 1 else None
        # A signal raises Stopped inside; not with several ranks, which wait for one another.
        self.interruptible: Any = nullcontext if any_rank else stop.interruptible
        logger.write_status("running")
        try:
            with suppress(Stopped), logger.display, closing(self._batches()) as batches:
                if self.ranks.main and self.config.run.track:
                    logger.trackers = Trackers(directory.path, state.config, progress.step, logger.display.log)
                if progress.evaluation_owed and self._evaluate():
                    self._save(better=True)
                for batch in batches:
                    self.batch = batch
                    logger.start("step")
                    self.lr_scheduler.step_update(progress.step)
                    generators = state.generators()
                    state.metrics.add(*self.updater(batch, progress.step + 1))
                    progress.step += 1
                    progress.samples += self.task.batch_size
                    if steps.due(progress.step, steps.log_every):
                        self._log(generators)
                    better = steps.due(progress.step, steps.eval_every) and self._evaluate()
                    now = time.monotonic()
                    if steps.time_limit_seconds is not None and now - stop.created >= steps.time_limit_seconds:
                        stop.reason = stop.reason or "time limit"
                    overdue = steps.save_every_seconds is not None and now - self.saved_at >= steps.save_every_seconds
                    writing = self.checkpoints.writing
                    failed = writing.done() and writing.exception() is not None  # the next save raises its error
                    flags = bool(stop), overdue or failed
                    stopping, save = any_rank(*flags) if any_rank else flags
                    pausing = progress.step == steps.stop_after
                    due = self.save_owed or steps.due(progress.step, steps.save_every, steps.milestone_every)
                    ending = pausing or (stopping and (progress.step < steps.total or progress.evaluation_owed))
                    if stopping or pausing or save or better or due:
                        self._save(better, ending)
                    if ending:
                        self._stop(stop.reason or ("stop after" if pausing else None))
                        return None
                return self._finish()
            if progress.step:  # Stopped in a wait for images, or on all ranks in an evaluation, which is then repeated
                self._save(ending=True)
            self._stop(stop.reason)
            return None
        except BaseException as error:
            described = error
            try:
                described = with_advice(error, directory.path, self.updater, self.batch)
            finally:  # the trials of memory can be interrupted
                self._write_failure(described)
            if described is error:
                raise
            raise described from error
        finally:
            if logger.trackers:
                logger.trackers.close()

    def _stop(self, reason: str | None) -> None:
        self.checkpoints.writing.result()
        self.logger.write_status("stopped", reason=reason)
        self.ranks.all_gather(None)  # torchrun ends the others as soon as one is done

    def _batches(self) -> Generator[TrainBatch]:
        """Yield the batches of the remaining steps. If there is no next one, save the steps before it."""
        progress, steps = self.state.progress, self.steps
        batches = self.task.batches(progress.step)
        if progress.step + 1 < steps.profile.stop:
            suffix = f"-rank-{self.ranks.rank}" if self.ranks.world_size > 1 else ""
            batches = profile_steps(batches, progress.step + 1, steps.profile, self.directory.path / "profile", suffix)
        with closing(batches):
            while progress.step < steps.total:
                self.logger.start("data")
                try:
                    with self.interruptible():
                        batch = next(batches)
                except (UserError, RunFailed) as error:  # an image can't be read, or a worker died
                    if self.ranks.world_size == 1 and progress.step:
                        self._save(ending=True)
                    if isinstance(error, UserError):
                        raise
                    change = f"data.workers={int(self.config.data.workers != 1)}"
                    again = command("train", "--resume", self.directory.path, "--change", change)
                    raise RunFailed(error.what, f"{error.tip}; resume with: {again}") from error
                yield batch

    def _log(self, generators: dict[str, torch.Tensor]) -> None:
        """Write the means since the last record; raise RunFailed if too many steps in a row were skipped."""
        lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in self.state.optimizer.param_groups)
        means, skipped, in_a_row = self.state.metrics.read(self.ranks)
        self.logger.start("step")  # reading waited for the device, so the timer now has all of its work
        self.state.progress.skipped += skipped
        self.logger.log_train(means, skipped, float(lr))
        if in_a_row >= (MAX_SKIPPED_FP16 if self.state.scaler.is_enabled() else MAX_SKIPPED):
            save_replay(self.directory.path, self.state, generators)
            what = f"loss or gradient was infinite or not a number in {in_a_row} steps in a row"
            replay = command("train", "--replay", self.directory.path)
            tip = f"start a new run with a lower --lr, or --clip-grad 1; to see where: {replay}"
            raise RunFailed(f"{what}, up to step {self.state.progress.step}", tip)

    def _evaluate(self) -> bool:
        """Return whether an evaluation is the best so far, and to be kept; a stopped one is repeated when resumed."""
        progress = self.state.progress
        self.logger.start("evaluate")
        self.state.check_weights()
        if self.ranks.world_size > 1:  # each has its own running statistics of a BatchNorm: rank 0's are taken
            distribute_bn(self.evaluated, self.ranks.world_size)
        progress.evaluation_owed = True
        with self.interruptible():
            records, headline = self.task.evaluate(self.evaluated)
        progress.evaluation_owed = False
        self.logger.start("step")
        for record_type, record in records.items():
            self.logger.log(record_type, record)
        at = f"epoch {self.logger.epoch:>4.4g}" if self.logger.in_epochs else f"step {progress.step:>5}"
        self.logger.display.bar.update(self.logger.display.task, completed=progress.step, description=at)
        self.logger.display.log(f"{at} {headline}")
        value = records["eval"][self.task.best_metric]
        better = math.isfinite(value) and (progress.best is None or value > progress.best)
        if better:
            progress.best, progress.best_step = value, progress.step
        return better and self.config.checkpoint.best

    def _save(self, better: bool = False, ending: bool = False) -> None:
        """Start to save, on all ranks; unless it is `ending`, a run that skipped its last step is first to recover."""
        self.save_owed = not ending and bool(self.state.metrics.sums["in_a_row"] > 0)
        if self.save_owed:
            return
        self.logger.start("save")
        self.directory.check()
        self.state.check_weights()
        snapshot = self.state.state_dict()
        if self.ranks.main:
            self.checkpoints.save(snapshot, better)
            replayed = self.directory.path / REPLAY
            if read_pointer(replayed / LAST) < f"step-{snapshot.step:08d}":  # the run has recovered
                shutil.rmtree(replayed, ignore_errors=True)
        self.logger.start("step")
        self.saved_at = time.monotonic()
        self.logger.write_status("running")

    def _write_failure(self, error: BaseException) -> None:
        """Write into status.json how the run ended; a second error becomes a note of the first."""
        status: Status = "failed"
        reason = getattr(error, "what", f"{type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            status, reason = "stopped", "interrupted"
        # The checkpoint that is being written is from before the error.
        for action in (self.checkpoints.writing.result, lambda: self.logger.write_status(status, reason=reason)):
            try:
                action()
            except (UserError, RunFailed) as second:
                if second is not error:
                    error.add_note(f"and {second.what}")

    def _finish(self) -> dict[str, Any]:
        """Measure and export the weights, and close the run; raises RunFailed if nothing was learned."""
        progress = self.state.progress
        self.checkpoints.writing.result()
        with self.interruptible():
            metrics = self.task.finish(self.evaluated, self.weights)
        tip = "start a new run: check --mean and --std, lower --lr, or use --clip-grad 1"
        if 2 * progress.skipped > progress.step:
            raise RunFailed(f"loss or gradient was not finite in {progress.skipped} of {progress.step} steps", tip)
        if not math.isfinite(loss := metrics.get("loss", 0.0)):
            raise RunFailed(f"the loss on held-out images is {loss} at the end", tip)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # only rank 0 gets the tensors
        weights: Any = get_model_state_dict(self.evaluated, options=options)
        if self.ranks.main:
            for name, content in self.task.export(weights, self.weights).items():
                self.directory.write(name, content)
        summary = {
            **metrics,
            "epochs": self.logger.epoch,
            "steps": progress.step,
            "steps_skipped": progress.skipped,
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(progress.samples / max(progress.seconds, 1e-9), 3),
            "seconds_by_phase": {phase: round(value, 3) for phase, value in progress.seconds_by_phase.items()},
        }
        self.directory.write("summary.json", summary)
        self.logger.write_status("finished")
        return summary
