import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from pdvit.errors import UserError
from pdvit.tracking import trackers as module
from pdvit.tracking.trackers import Trackers, check_trackers


class Fake:
    """A tracker that keeps its records, and fails in one of its functions."""

    def __init__(self, fails=""):
        self.fails, self.logged, self.finished = fails, [], 0

    def start(self, *_):
        if self.fails == "start":
            raise OSError("no\nnetwork")
        return self.log, self.finish

    def log(self, metrics, step):
        self.logged.append((step, metrics))
        if self.fails == "log":
            raise OSError("no space left")

    def finish(self):
        self.finished += 1
        if self.fails == "finish":
            raise TimeoutError("no answer")


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Return a function that opens fakes by name."""

    def open_fakes(**fakes):
        monkeypatch.setattr(module, "TRACKERS", {name: fake.start for name, fake in fakes.items()})
        warnings = []
        return Trackers(tmp_path, {"run": {"track": ", ".join(fakes)}}, 0, warnings.append), warnings

    return open_fakes


def test_every_tracker_gets_the_finite_numbers_of_a_record(opened):
    first, second = Fake(), Fake()
    trackers, warnings = opened(first=first, second=second)
    record = {"kind": "train", "step": 20, "epoch": 0.5, "loss": 2.25, "cosine": 0, "lr": math.nan, "top5": None}
    trackers.log(record | {"split": "val", "time": {"seconds": 3}})
    layers = {"step": 20, "epoch": 1.0, "images": 64, "layers": ["embed", "block 1", "norm"]}
    trackers.log({"kind": "similarity", **layers, "similarity": [0.25, None, 0.75]})
    trackers.close()
    for fake in (first, second):
        assert fake.finished == 1
        assert fake.logged == [
            (20, {"train/epoch": 0.5, "train/loss": 2.25, "train/cosine": 0.0, "time/seconds": 3.0}),
            (20, {"similarity/embed": 0.25, "similarity/norm": 0.75}),
        ]
    assert warnings == []


def test_a_tracker_that_fails_is_reported_once_and_left_out(opened):
    sound, broken, late = Fake(), Fake("log"), Fake("finish")
    trackers, warnings = opened(missing=Fake("start"), broken=broken, sound=sound, late=late)
    for step in (1, 2, 3):
        trackers.log({"kind": "train", "step": step, "loss": 1.0})
    trackers.close()
    assert [len(fake.logged) for fake in (broken, sound, late)] == [1, 3, 3]
    assert [line.partition(";")[0] for line in warnings] == [
        "missing failed (OSError: no network)",
        "broken failed (OSError: no space left)",
        "late failed (TimeoutError: no answer)",
    ]


def test_a_missing_tracker_names_its_extra(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # a folder that W&B leaves behind is no package
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="wandb is not installed") as caught:
        check_trackers("wandb")
    assert caught.value.tip == "pip install 'pdvit[wandb]'"


# The real packages, each in a process of its own: they keep threads, services and settings, and warn as they like.

TRAIN = """
import os, signal, sys, time
from pathlib import Path
from pdvit.tracking.trackers import Trackers

name, run, start, end = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
trackers = Trackers(run, {"run": {"track": name}}, start, sys.exit)
for step in range(start + 1, end + 1):
    trackers.log({"kind": "train", "step": step, "loss": step + start / 100})
    trackers.log({"kind": "similarity", "step": step, "layers": ["embed", "block 3"], "similarity": [0.5, None]})
if sys.argv[5] == "kill":
    time.sleep(1)  # trackio writes twice a second
    os.kill(os.getpid(), signal.SIGKILL)
trackers.close()
"""


@pytest.fixture
def environment(tmp_path):
    """An environment without keys, settings, home or network."""
    names = ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
    folders = {name: str(tmp_path / name) for name in names}
    own = folders | {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    return kept | own | {"WANDB_ERROR_REPORTING": "false"}


def python(code, *arguments, env):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def train(name, run, start, end, env, ending="close"):
    run.mkdir(exist_ok=True, parents=True)
    done = python(TRAIN, name, run, start, end, ending, env=env)
    assert done.returncode == (0 if ending == "close" else -signal.SIGKILL), done.stderr
    assert done.stdout == ""


def events(folder):
    """Return tag -> [(step, value)] as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_shows_a_resumed_run_once(tmp_path, environment):
    pytest.importorskip("tensorboard")
    run = tmp_path / "digits-paper"
    train("tensorboard", run, 0, 5, environment, "kill")
    assert events(run / "tensorboard")["train/loss"] == [(step, step) for step in range(1, 6)]
    train("tensorboard", run, 3, 6, environment)
    found = events(run / "tensorboard")
    assert set(found) == {"train/loss", "similarity/embed"}
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["train/loss"]] == pytest.approx([1, 2, 3, 4.03, 5.03, 6.03])


@pytest.mark.slow
def test_wandb_offline_is_one_run_that_has_every_step_once(tmp_path, environment):
    pytest.importorskip("wandb")
    run = tmp_path / "digits-paper"
    environment["WANDB_MODE"] = "offline"
    train("wandb", run, 0, 5, environment)
    train("wandb", run, 3, 6, environment)
    first, second = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert {first.name, second.name} == {f"run-{json.loads((run / 'wandb.json').read_text())['id']}.wandb"}
    assert all(name in file.read_bytes() for file in (first, second) for name in (b"loss", b"embed"))
    assert b"6.03" in second.read_bytes()
    assert b"5.03" not in second.read_bytes()


@pytest.mark.slow
def test_wandb_without_a_login_and_a_terminal_is_refused(environment):
    pytest.importorskip("wandb")
    done = python("from pdvit.tracking.trackers import check_trackers; check_trackers('wandb')", env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "UserError: W&B can't log in" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr


@pytest.mark.slow
def test_trackio_shows_a_resumed_run_once_and_separates_runs_of_one_name(tmp_path, environment):
    pytest.importorskip("trackio")
    run, other = tmp_path / "here" / "digits-paper", tmp_path / "there" / "digits-paper"
    train("trackio", run, 0, 5, environment, "kill")
    train("trackio", other, 0, 2, environment)
    train("trackio", run, 3, 6, environment)
    with closing(sqlite3.connect(tmp_path / "store" / "pdvit.db")) as store:
        rows = store.execute("SELECT run_name, run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    ids = [json.loads((folder / "trackio.json").read_text())["id"] for folder in (run, other)]
    assert {(name, id) for name, id, *_ in rows} == {("digits-paper", id) for id in ids}
    for run_id, steps in zip(ids, (6, 2), strict=True):
        sent = [(step, json.loads(text)) for _, id, step, text in rows if id == run_id]
        loss = {step: metrics["train/loss"] for step, metrics in sent if "train/loss" in metrics}
        assert list(loss) == list(range(1, steps + 1))
        assert list(loss.values()) == pytest.approx([1, 2, 3, 4, 5, 6.03][:steps])
