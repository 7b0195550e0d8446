"""Runs as jobs of this machine or of Slurm, through submitit: what a job does, and the jobs of a run or a sweep."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, LocalJob, SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import Checkpointable, TorchDistributedEnvironment

from pdvit.config import Config, parse_duration
from pdvit.config.schema import LaunchConfig
from pdvit.engine.terminal import EXIT_STOPPED, StopRequest, stop_on_signals
from pdvit.errors import RunFailed, UserError
from pdvit.files import read_json, reading
from pdvit.tracking.run_directory import CHECKPOINTS, JOBS, LAST, RunDirectory, hold, read_pointer, write_file, writing
from pdvit.workflows.console import make_console, process_group

FILE = "jobs.json"  # the last job of each name, as {name: [launcher, id, CUDA_VISIBLE_DEVICES]}
UNLIMITED = 10**6  # times that a job may be queued again, minutes of a local job, jobs of an array at a time
RANKS_APART = 60  # seconds that Slurm lets a run continue after its first process has ended
KILL_SECONDS = 3600.0  # a bound on the time between SIGTERM and SIGKILL
POLL_SECONDS = {"local": 0.2, "slurm": 5.0}  # between two looks at the jobs


@dataclass(frozen=True)
class RunJob(Checkpointable):
    """The function of a job; submitit pickles it, and queues it again. Each process of the run calls it."""

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
        last = self.run / CHECKPOINTS / LAST
        before = read_pointer(last)
        with stop_on_signals() as stop:
            status = self._attempt(stop, RunDirectory(self.run, main))
            if status == EXIT_STOPPED and not stop:
                time.sleep(1)  # another process of the run received the signal first
        # From here on, the signals are submitit's.
        if status == EXIT_STOPPED and stop.reason == "SIGUSR2":
            limit = parse_duration(launch.time, "min", "launch.time").seconds or 0.0
            if read_pointer(last) == before and time.monotonic() - begun > limit / 4:
                print(f"error: no step was saved in {launch.time}\n  tip:   a longer --time", file=sys.stderr)
                RunDirectory(self.run, main).mark("failed", f"no step was saved in a job of {launch.time}")
                sys.exit(1)
            signal.raise_signal(signal.SIGUSR2)  # submitit queues the job again, in rank 0
        if status == EXIT_STOPPED and slurm and stop.reason in ("SIGUSR2", "SIGTERM"):
            # Slurm cancels, preempts or requeues. A job that exits before it is preempted would not be queued again.
            time.sleep(KILL_SECONDS)
        sys.exit(status)

    def train(self, stop: StopRequest) -> int:
        """Start or resume the run; return the exit status; raises UserError and RunFailed."""
        from pdvit.workflows import runs  # imports torch: only once signals are handled

        console, run = make_console(as_json=False), self.run
        with process_group():
            prepare: Any = partial(runs.start, replace(self.config, run=replace(self.config.run, out=str(run))))
            if (self.run / "run.toml").is_file():
                prepare = partial(runs.resume, run, [*self.change], cpus=self.config.launch.cpus)
            return runs.train_to_end(prepare, console, stop)

    def _attempt(self, stop: StopRequest, directory: RunDirectory) -> int:
        """Train, and return the exit status; write a failure into status.json, unless the run did."""
        try:
            status = self.train(stop)
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
        if not directory.held():  # by another job, for which this one is refused
            directory.mark("stopped" if stop else "failed", "interrupted" if stop else " ".join(reason.split()))
        return EXIT_STOPPED if stop else 1


class Jobs:
    """The folder `jobs/` of a run or a sweep: what submitit writes there, and the ids of the jobs by name."""

    def __init__(self, owner: Path) -> None:
        self.folder = owner.resolve() / JOBS
        self.children: list[LocalJob[Any]] = []  # of this process, which has to wait for them

    def locked(self) -> AbstractContextManager[Any]:
        """Make the folder, and keep other commands from submitting jobs; raises UserError if one does."""
        what = "another command runs this, or submits its jobs"
        return hold(self.folder, what, "stop that one first, or wait for it")

    def ids(self) -> dict[str, tuple[str, str, str | None]]:
        """Return launcher, id and devices of the last job of each name."""
        file = self.folder / FILE
        if not file.is_file():
            return {}
        with reading(file, "delete it, if no job runs"):
            return {name: (str(job[0]), str(job[1]), job[2]) for name, job in read_json(file).items()}

    def states(self) -> dict[str, str]:
        """Return the states of the jobs that have not ended, such as PENDING or RUNNING; raises UserError."""
        ids, found = self.ids(), {}
        own = {job.job_id for job in self.children if not job.done()}
        if any(launcher == "slurm" for launcher, *_ in ids.values()):
            listed = _slurm("squeue", "--me", "--array", "--noheader", "--format=%i %T")
            found = dict(line.split(maxsplit=1) for line in listed.splitlines())
        for launcher, id_, _ in ids.values():
            with suppress(OSError):  # also those of a command that was killed
                if launcher == "local" and (
                    id_ in own or os.fsencode(self.folder) in Path(f"/proc/{id_}/cmdline").read_bytes()
                ):
                    found[id_] = "RUNNING"
        return {name: found[id_] for name, (_, id_, _) in ids.items() if id_ in found}

    def start(self, launch: LaunchConfig, waiting: dict[str, RunJob], devices: Sequence[str | None] = ()) -> list[str]:
        """Submit jobs by name, take them out of `waiting`, and return their names; raises UserError.

        To Slurm all of them, as one array; here one for each of `devices` that has no job.
        """
        taken = dict(waiting)
        if launch.launcher == "local":
            free = Counter(devices) - Counter(self.ids()[name][2] for name in self.states())
            pairs = zip(waiting.items(), free.elements(), strict=False)
            taken = {name: replace(job, devices=device) for (name, job), device in pairs}
        if taken:
            executor = _executor(self.folder, launch)
            with writing("jobs", self.folder), _detached():
                try:
                    started: list[Any] = executor.submit_array([*taken.values()])
                except FailedJobError as error:
                    what = re.sub(r"^sbatch: (error|fatal): ", "", str(error).strip().rpartition("\n")[2])
                    tip = "check the settings of [launch]; sinfo lists the partitions"
                    raise UserError(f"sbatch: {what}", "launch (--partition, --time, --sbatch, ...)", tip) from error
                self.children += [job for job in started if isinstance(job, LocalJob)]
                jobs = zip(taken.items(), started, strict=True)
                new = {name: [launch.launcher, found.job_id, job.devices] for (name, job), found in jobs}
                write_file(self.folder / FILE, json.dumps({**self.ids(), **new}, indent=2))
        for name in taken:
            del waiting[name]
        return [*taken]

    def log(self, name: str) -> Path:
        """Return the file of a job's output, that of rank 0."""
        return self.folder / f"{self.ids()[name][1]}_0_log.out"

    def cancel(self) -> list[str]:
        """Cancel the jobs that have not ended and return their names; runs save first."""
        names = [*self.states()]
        for launcher, id_, _ in map(self.ids().__getitem__, names):
            if launcher == "slurm":
                _slurm("scancel", id_)
            else:
                with suppress(ProcessLookupError):
                    os.kill(int(id_), signal.SIGTERM)
        return names


def end_of_job(launcher: str, id_: str) -> str:
    """Return the command that cancels a job."""
    return shlex.join(["scancel", id_] if launcher == "slurm" else ["kill", id_])


def _executor(folder: Path, launch: LaunchConfig) -> LocalExecutor | SlurmExecutor:
    if launch.launcher == "local":
        local = LocalExecutor(folder, max_num_timeout=UNLIMITED)
        local.update_parameters(tasks_per_node=launch.gpus or 1, timeout_min=UNLIMITED, stderr_to_stdout=True)
        return local
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            tip = "start it on a login node of the cluster, or use --launcher local"
            raise UserError(f"Slurm's {program} is not here", "launch.launcher (--launcher)", tip)
    limit, grace = (parse_duration(text, "min", "launch.time").seconds or 0 for text in (launch.time, launch.grace))
    if limit < max(60, grace):
        what = f"a job of {launch.time} has no time for a checkpoint"
        tip = f"Slurm counts minutes, and {launch.grace} are for saving: a longer --time, or a shorter --grace"
        raise UserError(what, "launch.time (--time)", tip)
    slurm = SlurmExecutor(folder, max_num_timeout=UNLIMITED)
    slurm.update_parameters(
        job_name=f"pdvit-{folder.parent.name}",
        nodes=launch.nodes,
        ntasks_per_node=launch.gpus or 1,
        gpus_per_node=launch.gpus,
        cpus_per_task=launch.cpus,
        mem=launch.mem,
        partition=launch.partition,
        account=launch.account,
        constraint=launch.constraint,
        array_parallelism=launch.parallel or UNLIMITED,
        time=ceil(limit / 60),
        signal_delay_s=int(grace),
        stderr_to_stdout=True,
        # srun has not taken over --cpus-per-task since Slurm 22.05.
        srun_args=[f"--wait={RANKS_APART}", *([f"--cpus-per-task={launch.cpus}"] if launch.cpus else [])],
        additional_parameters={"requeue": True, **(launch.sbatch or {})},
    )
    return slurm


def _slurm(*command: str) -> str:
    """Return the output of one of Slurm's commands; raises UserError."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        what = str(getattr(error, "stderr", "") or error).strip().rpartition("\n")[2]
        raise UserError(what, shlex.join(command), "jobs continue without this command: try it again") from error


@contextmanager
def _detached() -> Iterator[None]:
    """Keep signals and output of the terminal from processes that are started inside; a pipe would wait for them."""
    with ExitStack() as stack, open(os.devnull, "wb") as null:
        for number in (signal.SIGINT, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
        for stream in (1, 2):
            kept = os.dup(stream)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, stream)
            os.dup2(null.fileno(), stream)
        yield
