"""Runs as jobs: what a job does, and one run as a job. Imports no torch."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pdvit.config.resolve import resolve
from pdvit.config.schema import Config
from pdvit.errors import RunFailed, UserError
from pdvit.tracking.run_directory import STATUS, RunDirectory, write_file
from pdvit.workflows.console import log, process_group

if TYPE_CHECKING:
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.terminal import RunConsole, StopRequest
    from pdvit.launch import Jobs

RUN = "run"  # name of the job of a single run
POLL_SECONDS = {"local": 0.2, "slurm": 5.0}  # between two looks at the jobs


def train_job(config: Config, run: Path, change: tuple[str, ...], stop: "StopRequest") -> int:
    """Start or resume the run of a job; return the exit status, and raise UserError and RunFailed."""
    from pdvit.engine.distributed import init_process_group
    from pdvit.engine.terminal import RunConsole
    from pdvit.workflows.runs import resume, start, train_to_end

    with process_group():
        ranks = init_process_group(stop)
        check_shared(run, ranks)
        console = RunConsole(quiet=not ranks.main)
        if (run / "run.toml").is_file():
            return train_to_end(partial(resume, str(run), [*change]), console, stop)
        new = replace(config, run=replace(config.run, out=str(run)))
        return train_to_end(partial(start, new), console, stop)


def check_shared(run: Path, ranks: "Ranks") -> None:
    """Raise UserError if a process does not see what rank 0 writes into the run directory."""
    token = ranks.all_gather(secrets.token_hex(8))[0]
    file = run / f".token-{token}"
    if ranks.main:
        run.mkdir(exist_ok=True)
        write_file(file, token)
    ranks.all_gather(None)
    blind = [host for host in ranks.all_gather("" if file.is_file() else socket.gethostname()) if host]
    if ranks.main:
        file.unlink()
    if blind:
        tip = "choose an --out on a disk that all machines share"
        raise UserError("this machine does not see the run directory", f"{run} on {blind[0]}", tip)


def launch_run(
    config: Config, name: str | None, change: list[str], follow: bool, console: "RunConsole", stop: "StopRequest"
) -> int:
    """Submit a run as a job, a new one or that of --resume `name`; return the exit status."""
    from pdvit.launch import Jobs, RunJob, end_of_job
    from pdvit.workflows import runs

    if name is not None:
        path = runs.find_run(name)
        config = replace(runs.saved_config(path, change), launch=config.launch)
    else:
        if config.data.batch_size:
            resolve(config)  # raises the errors of settings before the job
        unnamed = config.run.name is None and config.run.out is None
        name_of_run = runs.default_name(config) if unnamed else config.run.name or ""
        path = RunDirectory.create(config.run.out, name_of_run).path
    jobs = Jobs(path)
    with jobs.locked():
        if jobs.states():
            launcher, id_, _ = jobs.ids()[RUN]
            tip = f"wait for it, or cancel it: {end_of_job(launcher, id_)}"
            raise UserError(f"job {id_} of this run has not ended", str(path), tip)
        job = RunJob(train_job, config, path.resolve(), (*change,))
        try:
            jobs.start(config.launch, {RUN: job}, [os.environ.get("CUDA_VISIBLE_DEVICES")])
        except UserError:
            if name is None and not jobs.ids():
                shutil.rmtree(jobs.folder)
                with suppress(OSError):  # a folder that was there before can have hidden files
                    path.rmdir()
            raise
    launcher, id_, _ = jobs.ids()[RUN]
    if console.stderr:
        print(json.dumps({"run": str(path), "launcher": launcher, "job": id_, "log": str(jobs.log(RUN))}, indent=2))
    log(console, f"job            {launcher} {id_}\nlog            {jobs.log(RUN)}\nrun directory  {path}")
    log(console, f"save and end   {end_of_job(launcher, id_)}")
    return _follow(jobs, path, console, stop) if follow else 0


def _follow(jobs: "Jobs", run: Path, console: "RunConsole", stop: "StopRequest") -> int:
    """Print the output of a job until it ends; return the exit status of its run. A signal leaves the job alone."""
    from pdvit.engine.terminal import EXIT_STOPPED

    file, seconds = jobs.log(RUN), POLL_SECONDS[jobs.ids()[RUN][0]]
    out = 2 if console.stderr else None
    with subprocess.Popen(["tail", "-n", "+1", "-F", file], stdout=out, stderr=subprocess.DEVNULL) as tail:
        try:
            while RUN in jobs.states() and not stop:
                time.sleep(seconds)
            time.sleep(1)  # it looks once a second
        finally:
            tail.terminate()
    if stop:
        log(console, f"the job continues; its log: {file}")
        return EXIT_STOPPED
    if not file.is_file():
        tip = "the machines of Slurm may not see it: choose an --out on a disk that all share"
        raise RunFailed(f"the job ended without output in {file.parent}", tip)
    status = RunDirectory(run).read_json(STATUS, optional=True).get("status", "")
    return {"finished": 0, "stopped": EXIT_STOPPED}.get(status, 1)
