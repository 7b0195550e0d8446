"""The work of a job: one run, which is started or resumed, saved when the job has to end, and queued again."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from pdvit.config import Config, parse_duration
from pdvit.engine.terminal import EXIT_STOPPED, StopRequest, stop_on_signals
from pdvit.errors import RunFailed, UserError
from pdvit.tracking.run_directory import CHECKPOINTS, RunDirectory, held

Train = Callable[[Config, Path, tuple[str, ...], StopRequest], int]  # starts or resumes a run; returns the exit status
KILL_SECONDS = 3600.0  # a bound on the time between SIGTERM and SIGKILL


@dataclass(frozen=True)
class RunJob:
    """The function of a job; submitit pickles it. Each process of the run calls it with the same arguments."""

    train: Train
    config: Config
    run: Path  # absolute
    change: tuple[str, ...] = ()  # of a resumed run
    devices: str | None = None  # CUDA_VISIBLE_DEVICES of a local job; unset: all

    def __call__(self) -> None:
        """Train the run and exit with its status."""
        begun, launch, slurm = time.monotonic(), self.config.launch, os.environ["SUBMITIT_EXECUTOR"] == "slurm"
        if not slurm:  # submitit hides the GPUs
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            os.environ |= {} if self.devices is None else {"CUDA_VISIBLE_DEVICES": self.devices}
        os.environ |= {} if launch.cpus is None else {"OMP_NUM_THREADS": str(launch.cpus)}
        main = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True).rank == 0
        before = self._checkpoint()
        with stop_on_signals() as stop:
            status = self._train(stop, RunDirectory(self.run, main))
            if status == EXIT_STOPPED and not stop:
                time.sleep(1)  # another process of the run received the signal first
        # From here on, the signals are submitit's.
        if status == EXIT_STOPPED and stop.reason == "SIGUSR2":
            limit = parse_duration(launch.time, "min", "launch.time").seconds or 0.0
            if self._checkpoint() == before and time.monotonic() - begun > limit / 4:
                print(f"error: no step was saved in {launch.time}\n  tip:   a longer --time", file=sys.stderr)
                RunDirectory(self.run, main).mark("failed", f"no step was saved in a job of {launch.time}")
                sys.exit(1)
            signal.raise_signal(signal.SIGUSR2)  # submitit calls `checkpoint` and queues the job again, in rank 0
        if status == EXIT_STOPPED and slurm and stop.reason in ("SIGUSR2", "SIGTERM"):
            # Slurm cancels, preempts or requeues. A job that exits before it is preempted would not be queued again.
            time.sleep(KILL_SECONDS)
        sys.exit(status)

    def checkpoint(self) -> DelayedSubmission:
        """Return what the job does when it is queued again; the interface of submitit."""
        return DelayedSubmission(self)

    def _train(self, stop: StopRequest, directory: RunDirectory) -> int:
        """Return the exit status; write a failure into status.json, unless the run did."""
        try:
            status = self.train(self.config, self.run, self.change, stop)
            if status == EXIT_STOPPED and not (self.run / "run.toml").is_file():  # it was stopped before it began
                directory.mark("stopped", stop.reason or "interrupted")
            return status
        except KeyboardInterrupt:
            return EXIT_STOPPED
        except (UserError, RunFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            reason = error.what
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        # A failure after a signal does not count: the end of a job also ends its workers, and may take its disk.
        if not held(self.run / CHECKPOINTS / ".lock"):  # by another job, for which this one is refused
            directory.mark("stopped" if stop else "failed", "interrupted" if stop else " ".join(reason.split()))
        return EXIT_STOPPED if stop else 1

    def _checkpoint(self) -> str | None:
        """Return the name of the last checkpoint."""
        last = self.run / CHECKPOINTS / "last"
        return last.read_text() if last.is_file() else None
