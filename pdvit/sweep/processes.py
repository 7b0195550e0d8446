"""A process for each cell of a sweep: one at a time, or one per device.

Each is forked from a helper that has imported its modules and computed nothing (multiprocessing's forkserver). So a
cell starts fast, in a clean process, and a crash of it leaves the others alone.
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
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pdvit.config import Config
from pdvit.engine.terminal import EXIT_STOPPED, STOPPING, StopRequest
from pdvit.errors import RunFailed, UserError
from pdvit.sweep.cells import Cell
from pdvit.sweep.folder import CellState, Folder

Train = Callable[[Config, Path], int]  # starts or resumes a run in a folder; returns the exit status
EXIT_ELSEWHERE = 74  # another process trains the cell; no command ends with it
POLL_SECONDS = 0.5  # between two checks of the clock and of signals


def run_cells(
    folder: Folder,
    cells: Sequence[Cell],
    train: Train,
    devices: Sequence[str | None],
    stop: StopRequest,
    limit: float | None = None,
) -> Generator[tuple[Cell, CellState, float]]:
    """Train the cells in order, one per device at a time, until all are done or a stop is requested.

    Yields each cell when it starts ("running", 0 s) and when it ends, with its seconds; 0 if another process finished
    it. `train` must be picklable. `devices` are the CUDA_VISIBLE_DEVICES of the processes; None leaves it unchanged.
    A stop, also after `limit` seconds, stops the cells too, resumable; so does closing the generator.
    """
    begun, terminated = time.monotonic(), False
    before = {cell.name: folder.written(cell.name).status for cell in cells}
    waiting, retried = deque(cells), set[str]()
    free, running = list(devices), dict[Any, tuple[ForkServerProcess, Cell, str | None, float]]()
    try:
        while running or (waiting and not stop):
            while waiting and free and not stop:
                cell = waiting.popleft()
                yield cell, CellState("running"), 0.0
                state = folder.written(cell.name)
                if state.status == "finished" or "failed" == state.status != before[cell.name]:  # meanwhile, by others
                    yield cell, state, 0.0
                    continue
                device = free.pop(0)
                process = _start(_train_cell, train, folder, cell, device)
                running[process.sentinel] = (process, cell, device, time.monotonic())
            ended = connection.wait(list(running), POLL_SECONDS)
            if limit is not None and time.monotonic() - begun >= limit:
                stop.reason = stop.reason or "time limit"
            for sentinel in ended:
                process, cell, device, since = running.pop(sentinel)
                free.append(device)
                if _finish_cell(process, folder, cell, bool(stop)) == EXIT_ELSEWHERE and cell.name not in retried:
                    waiting.append(cell)  # the other process may just be ending
                    retried.add(cell.name)
                yield cell, folder.state(cell.name), time.monotonic() - since
            if stop and not terminated:
                terminated = True
                for process, *_ in running.values():
                    process.terminate()  # the run finishes its step and saves
    finally:
        _end([process for process, *_ in running.values()])


def run_apart(function: Callable[..., Any], log: Path, stop: StopRequest, *arguments: Any) -> Any:
    """Return the result of a function in its own process; None if a stop is requested meanwhile.

    Raises its UserError or RunFailed, and RunFailed if the process dies.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = _start(_answer, sender, log, function, *arguments)
    sender.close()
    try:
        while not connection.wait([receiver], POLL_SECONDS):
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


def _start(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a process. Signals wait until it handles them, and never end the helper."""
    resource_tracker.ensure_running()  # first: its start unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def _end(processes: Sequence[ForkServerProcess]) -> None:
    """End the processes at once: a SIGINT after a SIGTERM ends a run, which still writes its status."""
    for process in processes:
        for number in (signal.SIGTERM, signal.SIGINT):
            if process.is_alive() and process.pid is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)
    for process in processes:
        process.join()


def _finish_cell(process: ForkServerProcess, folder: Folder, cell: Cell, stopping: bool) -> int:
    """Return the exit status of a cell's process; if it wrote no reason, write one.

    A failure after a requested stop does not count: the end of a job may also end its workers and its disk.
    """
    process.join()
    status = process.exitcode or 0
    if status not in (0, EXIT_STOPPED, EXIT_ELSEWHERE):
        failed = folder.written(cell.name).status == "failed"
        if stopping and failed:
            folder.mark(cell.name, "stopped", "interrupted")
        elif not (stopping or failed or folder.state(cell.name).status == "running"):  # else only the helper died
            folder.mark(cell.name, "failed", _ending(process))
    return status


def _ending(process: ForkServerProcess) -> str:
    status = process.exitcode or 0
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _answer(
    sender: "connection.Connection[Any, Any]", log: Path, function: Callable[..., Any], *arguments: Any
) -> None:
    """Send the result of a function, or its error."""
    _set_up(log)
    try:
        sender.send(function(*arguments))
    except (UserError, RunFailed) as error:
        sender.send(error)


def _train_cell(train: Train, folder: Folder, cell: Cell, device: str | None) -> None:
    """Start or resume a cell, unless it is finished or another process trains it; the main function of a process."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    _set_up(folder.log(cell.name))
    with folder.claimed(cell.name) as mine:
        try:
            sys.exit(_attempt(train, folder, cell) if mine else EXIT_ELSEWHERE)
        finally:
            atexit._run_exitfuncs()  # multiprocessing ends without them


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


def _set_up(log: Path) -> None:
    """Set up a new process: its output goes to a file, and it stops when the sweep stops it or dies.

    It leaves the process group, whose signals (of a terminal or a scheduler) would also end the cell's workers.
    """
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    multiprocessing.set_start_method(None, force=True)  # the default for the cell's workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_stop_after, args=(parent.sentinel,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _stop_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
