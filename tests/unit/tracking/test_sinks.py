import importlib.machinery
import json
import math
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing

import pytest

from pdvit.errors import UserError
from pdvit.tracking import sinks as module
from pdvit.tracking.sinks import Sinks, check_sinks, numbers_of, open_sinks
from pdvit.tracking.trackers import _Remembering


class Fake:
    """A tracker that keeps what it is given."""

    def __init__(self, *arguments):
        self.arguments, self.logged, self.closed = arguments, [], 0

    def log(self, step, numbers):
        self.logged.append((step, dict(numbers)))

    def close(self):
        self.closed += 1


class Breaking(Fake):
    def log(self, step, numbers):
        super().log(step, numbers)
        raise OSError("no space left")


class BreakingAtTheEnd(Fake):
    def close(self):
        super().close()
        raise TimeoutError("nobody answers")


@pytest.fixture
def fakes(monkeypatch):
    """Two trackers under known names, both installed."""
    made = {"tensorboard": Fake, "trackio": Fake}
    monkeypatch.setattr(module, "TRACKERS", made)
    monkeypatch.setattr(module, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None, origin="there"))
    return made


def test_a_training_record():
    record = {"step": 20, "epoch": 0.5, "loss": 2.25, "cosine": 0, "lr": 1e-3}
    assert numbers_of("train", record, {"seconds": 3.5, "images_per_second": 1e3}) == {
        "train/epoch": 0.5,
        "train/loss": 2.25,
        "train/cosine": 0.0,
        "train/lr": 1e-3,
        "time/seconds": 3.5,
        "time/images_per_second": 1000.0,
    }


def test_an_evaluation_leaves_out_words_truths_and_what_is_not_finite():
    record = {"step": 20, "epoch": 1.0, "split": "val", "accuracy": 0.5, "loss": math.nan, "top5": None, "best": True}
    assert numbers_of("eval", record | {"worst": -math.inf}) == {"eval/accuracy": 0.5}


def test_similarity_by_layer():
    record = {"step": 20, "epoch": 1.0, "images": 64, "layers": ["embed", "block 1", "norm"]}
    assert numbers_of("similarity", record | {"similarity": [0.25, None, 0.75]}) == {
        "similarity/embed": 0.25,
        "similarity/norm": 0.75,
    }


def test_an_unknown_tracker_names_the_closest():
    with pytest.raises(UserError, match="no tracker 'tensorbord'") as caught:
        check_sinks(["tensorbord"])
    assert caught.value.where == "run.track (--track)"
    assert caught.value.tip == "did you mean 'tensorboard'?"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    for refuse in (lambda: check_sinks([name]), lambda: open_sinks([name], tmp_path, {}, 0)):
        with pytest.raises(UserError, match=f"{name} is not installed") as caught:
            refuse()
        assert caught.value.tip == f"pip install 'pdvit[{name}]'"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="not installed"):
        check_sinks(["wandb"])


def test_nothing_to_track_is_fine(tmp_path):
    check_sinks([])
    assert open_sinks([], tmp_path, {}, 0) == []


def test_a_name_twice_opens_once(fakes, tmp_path):
    (sink,) = open_sinks(["trackio", "trackio"], tmp_path, {"run": {}}, 7)
    assert sink.arguments == (tmp_path, {"run": {}}, 7)


def test_a_tracker_that_does_not_start_is_an_error_and_the_others_are_closed(fakes, tmp_path):
    def fail(*arguments):
        raise OSError("no network")

    first = Fake()
    fakes |= {"tensorboard": lambda *arguments: first, "trackio": fail}
    with pytest.raises(UserError, match="trackio does not start: OSError: no network"):
        open_sinks(["tensorboard", "trackio"], tmp_path, {}, 0)
    assert first.closed == 1


def test_a_resumed_run_goes_on_without_a_tracker_that_does_not_start(fakes, tmp_path):
    def fail(*arguments):
        raise OSError("no\nnetwork")

    fakes["tensorboard"], said = fail, []
    (sink,) = open_sinks(["tensorboard", "trackio"], tmp_path, {}, 9, said.append)
    assert isinstance(sink, Fake)
    assert said == ["tensorboard does not start: OSError: no network; the run goes on without it"]


def test_records_reach_every_tracker():
    both, said = [Fake(), Fake()], []
    tracked = Sinks(both, said.append)
    tracked.log("train", 10, {"step": 10, "loss": 1.5}, {"seconds": 2.0})
    tracked.log("eval", 10, {"step": 10, "accuracy": 0.5})
    tracked.close()
    tracked.close()
    for sink in both:
        assert sink.logged == [(10, {"train/loss": 1.5, "time/seconds": 2.0}), (10, {"eval/accuracy": 0.5})]
        assert sink.closed == 1
    assert said == []


def test_a_tracker_that_breaks_is_reported_once_and_left_out():
    sound, broken, late, said = Fake(), Breaking(), BreakingAtTheEnd(), []
    tracked = Sinks([broken, sound, late], said.append)
    for step in (1, 2, 3):
        tracked.log("train", step, {"loss": 1.0})
    assert [len(sink.logged) for sink in (broken, sound, late)] == [1, 3, 3]
    tracked.close()
    assert (broken.closed, sound.closed, late.closed) == (0, 1, 1)
    assert [line.split(";")[0] for line in said] == [
        "Breaking broke (OSError: no space left)",
        "BreakingAtTheEnd broke (TimeoutError: nobody answers)",
    ]


def test_a_record_that_can_not_be_read_does_not_end_the_run():
    said = []
    Sinks([Fake()], said.append).log("similarity", 1, {"layers": ["embed"], "similarity": []})
    assert len(said) == 1


def test_ctrl_c_is_not_caught():
    class Interrupted(Fake):
        def log(self, step, numbers):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([Interrupted()], print).log("train", 1, {"loss": 1.0})


class Run:
    """What the init of W&B or trackio returns, as far as it is used."""

    def __init__(self):
        self.steps = []

    def log(self, numbers, step):
        self.steps.append(step)


def remembering(file):
    tracker = _Remembering(file)
    tracker.run = Run()
    return tracker


def test_what_was_sent_is_not_sent_twice(tmp_path):
    file = tmp_path / "tracker.json"
    first = remembering(file)
    for step in (10, 10, 20, 30):
        first.log(step, {"loss": 1.0})
    second = remembering(file)  # resumed from step 20, so 30 comes again
    assert second.id == first.id
    second.log(30, {"loss": 1.0})
    second.log(40, {"loss": 1.0})
    assert first.run.steps == [10, 10, 20, 30]
    assert second.run.steps == [40]
    assert json.loads(file.read_text()) == {"id": first.id, "step": 40}
    assert [path.name for path in tmp_path.iterdir()] == ["tracker.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": "a", "step": null}'])
def test_a_damaged_memory_starts_another_run_over_there(tmp_path, text):
    file = tmp_path / "tracker.json"
    file.write_text(text)
    tracker = remembering(file)
    tracker.log(1, {"loss": 1.0})
    assert json.loads(file.read_text()) == {"id": tracker.id, "step": 1}
    assert len(tracker.id) == 16


# The real packages. Each is used in a process of its own: they keep threads, services and settings, and warn as they
# like, which is no business of ours.

TRAIN = """
import os, signal, sys, time
from pathlib import Path
from pdvit.tracking.sinks import Sinks, open_sinks

name, run, start, end = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
tracked = Sinks(open_sinks([name], run, {"run": {"seed": 0}}, start), lambda text: sys.exit(text))
for step in range(start + 1, end + 1):
    tracked.log("train", step, {"step": step, "loss": step + start / 100})
    tracked.log("similarity", step, {"step": step, "layers": ["embed", "block 3"], "similarity": [0.5, None]})
if sys.argv[5] == "kill":
    time.sleep(1)  # trackio writes twice a second
    os.kill(os.getpid(), signal.SIGKILL)
tracked.close()
"""


@pytest.fixture
def surroundings(tmp_path):
    """The environment of the tests' runs: nobody's keys, settings or home, and no network."""
    mine = {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "WANDB_ERROR_REPORTING": "false",
        "TRACKIO_DIR": str(tmp_path / "store"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    return others | mine


def python(code, *arguments, env):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def train(name, run, start, end, env, how="close"):
    run.mkdir(exist_ok=True, parents=True)
    done = python(TRAIN, name, run, start, end, how, env=env)
    assert done.returncode == (0 if how == "close" else -signal.SIGKILL), done.stderr
    assert done.stdout == ""
    return done


def events(folder):
    """Return tag -> [(step, value)] as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_shows_a_resumed_run_once(tmp_path, surroundings):
    pytest.importorskip("tensorboard")
    run = tmp_path / "digits-paper"
    train("tensorboard", run, 0, 5, surroundings, "kill")
    assert events(run / "tensorboard")["train/loss"] == [(step, step) for step in range(1, 6)]
    train("tensorboard", run, 3, 6, surroundings)
    shown = events(run / "tensorboard")
    assert set(shown) == {"train/loss", "similarity/embed"}
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in shown["train/loss"]] == pytest.approx([1, 2, 3, 4.03, 5.03, 6.03])


@pytest.mark.slow
def test_tensorboard_shows_a_run_from_its_start_once(tmp_path, surroundings):
    pytest.importorskip("tensorboard")
    for end in (4, 2):  # killed before its first checkpoint, then once more from the start
        train("tensorboard", tmp_path / "run", 0, end, surroundings)
    assert events(tmp_path / "run" / "tensorboard")["train/loss"] == [(1, 1.0), (2, 2.0)]


def history(file):
    """Return the rows in a file of W&B, as an upload would send them; its format is LevelDB's log under a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, rows = file.read_bytes(), 7, []
    assert len(data) < 32768, "one block, in which every record is whole"
    while place < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1
        place += 7 + length
        record = Record.FromString(data[place - length : place])
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((row.pop("_step"), {name: value for name, value in row.items() if name[0] != "_"}))
    return rows


@pytest.mark.slow
def test_wandb_offline_is_one_run_that_has_every_step_once(tmp_path, surroundings):
    pytest.importorskip("wandb")
    run = tmp_path / "digits-paper"
    surroundings["WANDB_MODE"] = "offline"
    train("wandb", run, 0, 5, surroundings)
    train("wandb", run, 3, 6, surroundings)
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{json.loads((run / 'wandb.json').read_text())['id']}.wandb"}
    first, second = map(history, files)
    assert first == [(step, {"train/loss": step, "similarity/embed": 0.5}) for step in range(1, 6)]
    assert second == [(6, {"train/loss": 6.03, "similarity/embed": 0.5})]


@pytest.mark.slow
def test_wandb_without_a_login_and_a_terminal_is_refused(surroundings):
    pytest.importorskip("wandb")
    done = python("from pdvit.tracking.sinks import check_sinks; check_sinks(['wandb'])", env=surroundings)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "UserError: W&B can't log in" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr


@pytest.mark.slow
def test_trackio_shows_a_resumed_run_once_and_tells_runs_of_one_name_apart(tmp_path, surroundings):
    pytest.importorskip("trackio")
    run, other = tmp_path / "here" / "digits-paper", tmp_path / "there" / "digits-paper"
    train("trackio", run, 0, 5, surroundings, "kill")
    train("trackio", other, 0, 2, surroundings)
    train("trackio", run, 3, 6, surroundings)
    with closing(sqlite3.connect(tmp_path / "store" / "pdvit.db")) as store:
        rows = store.execute("SELECT run_name, run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    ids = [json.loads((folder / "trackio.json").read_text())["id"] for folder in (run, other)]
    assert {(name, id) for name, id, *_ in rows} == {("digits-paper", id) for id in ids}
    shown = [[(step, json.loads(text)) for _, id, step, text in rows if id == wanted] for wanted in ids]
    for found, last in zip(shown, (6, 2), strict=True):
        loss = [(step, numbers["train/loss"]) for step, numbers in found if "train/loss" in numbers]
        assert [step for step, _ in loss] == list(range(1, last + 1))
        assert [value for _, value in loss] == pytest.approx([1, 2, 3, 4, 5, 6.03][:last])
        assert [step for step, numbers in found if "similarity/embed" in numbers] == list(range(1, last + 1))
