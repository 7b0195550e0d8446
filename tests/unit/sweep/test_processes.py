"""Cells in processes of their own, with work that takes no time in place of training."""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from multiprocessing import set_forkserver_preload

import pytest

from pdvit.engine.terminal import StopRequest
from pdvit.errors import RunFailed, UserError
from pdvit.sweep import CellState, Folder, make_cells, run_apart, run_cells
from tests.files import read_json

WORK = '''
import atexit, json, multiprocessing, os, signal, sys, time
from pathlib import Path
from pdvit.errors import RunFailed, UserError

def finish(run, **facts):
    run.mkdir(exist_ok=True)
    for name in ("run.toml", "environment.json"):
        (run / name).write_text("{}")
    (run / "summary.json").write_text(json.dumps(facts))
    (run / "status.json").write_text('{"status": "finished"}')
    return 0

def train(ways, config, run):
    """End in the way that stands for the seed."""
    way = ways[config.run.seed]
    print("this is cell", config.run.seed)
    if way == "refused": raise UserError("the disk is full", "here", "make room")
    if way == "broken": raise RunFailed("not finite", "lower")
    if way == "bug": raise ValueError("a\\nbug")
    if way == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if way == "exits": os._exit(3)
    if way == "slow":
        (run.parent / f"begun-{config.run.seed}").write_text(str(os.getpid()))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        time.sleep(60)
    if way == "breaks when stopped":
        def broken(*_): raise RuntimeError("a worker is gone")
        signal.signal(signal.SIGTERM, broken)
        (run.parent / f"begun-{config.run.seed}").touch()
        time.sleep(60)
    if way == "leaves":
        assert multiprocessing.get_start_method(allow_none=True) is None
        atexit.register((run.parent / "left").touch)
    return finish(run, device=os.environ.get("CUDA_VISIBLE_DEVICES"), process=os.getpid())

def meet(count, config, run):
    """Wait until so many cells run at the same time."""
    (run.parent / f"begun-{config.run.seed}").touch()
    while len(list(run.parent.glob("begun-*"))) < count:
        time.sleep(0.01)
    return finish(run, device=os.environ.get("CUDA_VISIBLE_DEVICES"))

def answer(way):
    if way == "refused": raise UserError("what", "where", "tip")
    if way == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if way == "slow": time.sleep(60)
    return way * 2
'''


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pdvit_sweep_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    import pdvit_sweep_work

    set_forkserver_preload([])  # for the helper that one test here kills: the next one imports nothing
    yield pdvit_sweep_work
    sys.modules.pop("pdvit_sweep_work")


def sweep(tmp_path, count: int) -> tuple[Folder, list]:
    folder, table = Folder(tmp_path / "sweep"), {"run.seed": [*range(count)]}
    cells = make_cells({}, table, "x.toml")
    folder.begin({}, table, cells)
    return folder, cells


def train(work, folder, cells, ways, devices=(None,), stop=None, limit=None) -> list[tuple]:
    """Run the cells and return the reports."""
    stop = StopRequest() if stop is None else stop  # without a request it is false
    return list(run_cells(folder, cells, partial(work.train, ways), devices, stop, limit))


@contextmanager
def once_begun(folder: Folder, count: int, act):
    """Call `act` in a thread as soon as so many cells have begun."""

    def wait() -> None:
        while len(list(folder.path.glob("begun-*"))) < count:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def summary(folder: Folder, seed: int) -> dict:
    return read_json(folder.path / f"seed={seed}" / "summary.json")


def test_failures_are_recorded_and_passed_over(tmp_path, work):
    ways = ["refused", "broken", "bug", "killed", "exits", "well"]
    folder, cells = sweep(tmp_path, len(ways))
    reports = train(work, folder, cells, ways)
    states = [folder.state(cell.name) for cell in cells]
    assert [state.status for state in states] == ["failed"] * 5 + ["finished"]
    reasons = ["the disk is full", "not finite", "ValueError: a bug", "ended by SIGKILL", "ended with status 3", ""]
    assert [state.reason for state in states] == reasons
    begins = [(1, "running"), (1, "failed"), (2, "running"), (2, "failed")]
    assert [(cell.number, state.status) for cell, state, _ in reports[:4]] == begins
    assert "this is cell 0\nerror: the disk is full" in folder.log("seed=0").read_text()
    assert "ValueError" in folder.log("seed=2").read_text()


def test_each_cell_has_a_process_and_each_device_one_cell_at_a_time(tmp_path, work):
    folder, cells = sweep(tmp_path, 2)
    list(run_cells(folder, cells, partial(work.meet, 2), ["7", "GPU-x"], StopRequest()))
    assert {summary(folder, seed)["device"] for seed in (0, 1)} == {"7", "GPU-x"}
    folder, cells = sweep(tmp_path / "one", 3)
    train(work, folder, cells, [""] * 3, ["5"])
    assert {summary(folder, seed)["device"] for seed in range(3)} == {"5"}
    assert len({summary(folder, seed)["process"] for seed in range(3)} - {os.getpid()}) == 3


def test_a_stop_stops_the_cells_without_a_failure_and_begins_no_other(tmp_path, work):
    (folder, cells), stop = sweep(tmp_path, 3), StopRequest()
    with once_begun(folder, 2, lambda: setattr(stop, "reason", "SIGINT")):
        reports = train(work, folder, cells, ["slow", "breaks when stopped", "slow"], ["0", "1"], stop)
    expected = [(1, "running"), (1, "waiting"), (2, "running"), (2, "stopped")]
    assert sorted((cell.number, state.status) for cell, state, _ in reports) == expected


def test_a_cell_that_outlives_the_helper_has_not_failed(tmp_path, work):
    from multiprocessing.forkserver import _forkserver

    folder, cells = sweep(tmp_path, 1)
    with once_begun(folder, 1, lambda: os.kill(_forkserver._forkserver_pid, signal.SIGKILL)):
        reports = train(work, folder, cells, ["slow"])
    assert [state.status for _, state, _ in reports] == ["running", "running"]
    os.kill(int((folder.path / "begun-0").read_text()), signal.SIGTERM)


def test_a_cell_begins_and_ends_as_any_process_does(tmp_path, work):
    folder, cells = sweep(tmp_path, 1)
    train(work, folder, cells, ["leaves"])
    assert folder.state("seed=0").status == "finished"
    assert (folder.path / "left").exists()
    # a finished cell is not trained again
    reports = train(work, folder, cells, ["broken"])
    assert [(state.status, seconds) for _, state, seconds in reports] == [("running", 0.0), ("finished", 0.0)]


def test_the_time_limit_stops(tmp_path, work):
    (folder, cells), stop = sweep(tmp_path, 2), StopRequest()
    train(work, folder, cells, ["slow"] * 2, stop=stop, limit=0.01)
    assert (stop.reason, (folder.path / "begun-1").exists()) == ("time limit", False)


def test_what_failed_with_others_meanwhile_is_not_tried_again_and_what_had_failed_before_is(tmp_path, work):
    folder, cells = sweep(tmp_path, 2)
    reports = []
    for cell, state, _ in run_cells(folder, cells, partial(work.train, ["well", "well"]), [None], StopRequest()):
        reports.append((cell.number, state.status))
        if reports == [(1, "running")]:  # another process ends cell 2 meanwhile
            folder.mark(cells[1].name, "failed", "theirs")
    assert reports == [(1, "running"), (1, "finished"), (2, "running"), (2, "failed")]
    assert folder.state("seed=1") == CellState("failed", "theirs")
    train(work, folder, cells[1:], ["well", "well"])
    assert folder.state("seed=1").status == "finished"


def test_what_is_asked_of_a_process_is_answered(tmp_path, work):
    log, stop = tmp_path / "log", StopRequest()
    assert run_apart(work.answer, log, stop, "ab") == "abab"
    with pytest.raises(UserError) as caught:
        run_apart(work.answer, log, stop, "refused")
    assert caught.value.tip == "tip"
    with pytest.raises(RunFailed, match="ended by SIGKILL"):
        run_apart(work.answer, log, stop, "killed")
    stop.reason = "SIGTERM"
    assert run_apart(work.answer, log, stop, "slow") is None


def test_signals_to_the_group_do_not_end_the_helper(tmp_path, work):
    """Slurm and terminals signal every process; the helper has to outlive that, or no exit status comes back."""
    from multiprocessing.forkserver import _forkserver

    folder, cells = sweep(tmp_path, 1)
    train(work, folder, cells, [""])
    helper = _forkserver._forkserver_pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(helper, number)
    assert run_apart(work.answer, tmp_path / "log", StopRequest(), "ab") == "abab"
    assert _forkserver._forkserver_pid == helper
