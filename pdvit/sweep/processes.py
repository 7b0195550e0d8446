"""Processes of their own for the cells of a sweep: one at a time, or one per device.

Each is forked from a helper that has imported what they need and computed nothing (multiprocessing's forkserver). So a
cell starts as fast as in one process, finds what a process started by hand finds, and takes nothing with it if it
crashes.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pdvit.config import Config
from pdvit.engine.terminal import EXIT_STOPPED, STOPPING, StopRequest
from pdvit.errors import RunFailed, UserError
from pdvit.sweep.cells import Cell
from pdvit.sweep.folder import Folder, State

# Trains a configuration into a folder, or goes on with the run that is there; returns the exit status.
Train = Callable[[Config, Path], int]
Say = Callable[[str], None]
EXIT_ELSEWHERE = 74  # another process trains the cell; no command ends with it
TURN = 0.5  # seconds between two looks at the clock and at signals


def run_cells(
    folder: Folder,
    cells: Sequence[Cell],
    train: Train,
    devices: Sequence[str | None],
    stop: StopRequest,
    report: Callable[[Cell, State, float], None],
    limit: float | None = None,
) -> None:
    """Train the cells in order, one per device at a time, until all are done or a stop is asked for.

    Args:
        folder: that of the sweep.
        cells: those to train; what others train meanwhile is passed over.
        train: the work; a function that can be pickled.
        devices: for each process at a time, its CUDA_VISIBLE_DEVICES; None leaves it as it is.
        stop: stops the cells too, resumable.
        report: is told of each cell that begins ("running") and that ends, with the seconds since then; 0 where
            another process finished it.
        limit: seconds after which to stop.
    """
    begun, asked = time.monotonic(), False
    before = {cell.name: folder.written(cell.name).status for cell in cells}
    waiting, again = deque(cells), set[str]()
    free, running = list(devices), dict[Any, tuple[ForkServerProcess, Cell, str | None, float]]()
    try:
        while running or (waiting and not stop):
            while waiting and free and not stop:
                cell = waiting.popleft()
                report(cell, State("running"), 0.0)
                state = folder.written(cell.name)
                if state.status == "finished" or "failed" == state.status != before[cell.name]:  # meanwhile, by others
                    report(cell, state, 0.0)
                    continue
                device = free.pop(0)
                process = _start(_train_cell, train, folder, cell, device)
                running[process.sentinel] = (process, cell, device, time.monotonic())
            ended = connection.wait(list(running), TURN)
            if limit is not None and time.monotonic() - begun >= limit:
                stop.reason = stop.reason or "time limit"
            for sentinel in ended:
                process, cell, device, since = running.pop(sentinel)
                free.append(device)
                if _settle(process, folder, cell, bool(stop)) == EXIT_ELSEWHERE and cell.name not in again:
                    waiting.append(cell)  # perhaps somebody is just ending it
                    again.add(cell.name)
                report(cell, folder.state(cell.name), time.monotonic() - since)
            if stop and not asked:
                asked = True
                for process, *_ in running.values():
                    process.terminate()  # the run finishes its step and saves
    finally:
        _end([process for process, *_ in running.values()])


def run_apart(function: Callable[..., Any], log: Path, stop: StopRequest, *arguments: Any) -> Any:
    """Return what a function returns in a process of its own; None where a stop was asked for meanwhile.

    Raises the UserError or RunFailed that it raises, and RunFailed where the process dies.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = _start(_answer, sender, log, function, *arguments)
    sender.close()
    try:
        while not connection.wait([receiver], TURN):
            if stop:
                return None
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise RunFailed(f"the process {_ending(process)}", f"its output is in {log}") from None
    finally:
        _end([process])
    if isinstance(answer, Exception):
        raise answer
    return answer


def preload(modules: Sequence[str]) -> None:
    """Name what the helper imports once for all processes."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


def _start(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a process; signals wait until it is ready for them, and never end the helper."""
    resource_tracker.ensure_running()  # now: it would let signals through again while it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def _end(processes: Sequence[ForkServerProcess]) -> None:
    """End what still runs, at once: a run takes a SIGINT after a SIGTERM for that, and still says so in its files."""
    for process in processes:
        for number in (signal.SIGTERM, signal.SIGINT):
            if process.is_alive() and process.pid is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)
    for process in processes:
        process.join()


def _settle(process: ForkServerProcess, folder: Folder, cell: Cell, stopping: bool) -> int:
    """Return how a cell's process ended; where it had no time to say why, write that down.

    A failure after a stop was asked for is none of the cell: whoever ends a job may end its workers and its disk too.
    """
    process.join()
    status = process.exitcode or 0
    if status not in (0, EXIT_STOPPED, EXIT_ELSEWHERE):
        failed = folder.written(cell.name).status == "failed"
        if stopping and failed:
            folder.mark(cell.name, "stopped", "interrupted")
        elif not (stopping or failed or folder.state(cell.name).status == "running"):  # unless only the helper died
            folder.mark(cell.name, "failed", _ending(process))
    return status


def _ending(process: ForkServerProcess) -> str:
    status = process.exitcode or 0
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _answer(
    sender: "connection.Connection[Any, Any]", log: Path, function: Callable[..., Any], *arguments: Any
) -> None:
    """Send what a function returns, or its error."""
    _enter(log)
    try:
        sender.send(function(*arguments))
    except (UserError, RunFailed) as error:
        sender.send(error)


def _train_cell(train: Train, folder: Folder, cell: Cell, device: str | None) -> None:
    """Train a cell, or go on with it, unless it is finished or another process does it; the work of a process."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    _enter(folder.log(cell.name))
    with folder.claimed(cell.name) as mine:
        try:
            sys.exit(_attempt(train, folder, cell) if mine else EXIT_ELSEWHERE)
        finally:
            atexit._run_exitfuncs()  # as at the end of any process; multiprocessing's end without it


def _attempt(train: Train, folder: Folder, cell: Cell) -> int:
    if folder.written(cell.name).status == "finished":
        return 0
    try:
        return train(cell.config, folder.path / cell.name)
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        reason = error.what
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    folder.mark(cell.name, "failed", " ".join(reason.split()))
    return 1


def _enter(log: Path) -> None:
    """Make a new process ready: its output goes to a file, and it stops when the sweep says so or has died.

    Signals to the group (a terminal's, a scheduler's) reach the sweep alone: they would end the cell's workers too.
    """
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    multiprocessing.set_start_method(None, force=True)  # workers of the cell are started as in any process
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_stop_after, args=(parent.sentinel,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _stop_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
