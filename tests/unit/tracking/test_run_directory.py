import json
import subprocess
import sys

import pytest

from pdvit.errors import RunFailed
from pdvit.tracking.run_directory import RunDirectory, find_run, write_file
from tests.errors import refused
from tests.files import read_records

pytestmark = pytest.mark.usefixtures("workplace")


NO_RUN, NO_NAME, EXISTS = "run directory can't be written", "not a name", "exists"


@pytest.mark.parametrize(
    ("out", "name", "message"),
    [
        *((out, "name", EXISTS) for out in ("a run", ".", "file", "link")),
        *((out, "name", NO_RUN) for out in ("file/run", "/proc/run", "x" * 300, None)),
        *(("", "unused", NO_NAME), (None, "", NO_NAME), (None, "..", NO_NAME), (None, "a/b", NO_NAME)),
    ],
)
def test_a_path_that_exists_or_is_none_or_can_not_be_written_is_an_error_and_a_link_not_followed(
    workplace, out, name, message
):
    (workplace / "a run").mkdir()
    for file in ("a run/run.toml", "file"):
        (workplace / file).touch()
    for link in ("link", "runs"):
        (workplace / link).symlink_to(workplace / "nowhere")
    with refused(message, tip="--resume 'a run'" if out == "a run" else "--out"):
        RunDirectory.create(out, name, "")
    assert not (workplace / "nowhere").exists()


@pytest.mark.parametrize("config", ["", None])
def test_files_of_others_and_of_a_run_without_its_settings_stay(workplace, config):
    """As those of a cell that lost run.toml."""
    cell, names = workplace / "cell", ["metrics.jsonl", "notes.txt"]
    cell.mkdir()
    for name in names:
        (cell / name).write_bytes(b"mine")
    with refused("exists"):
        RunDirectory.create("cell", "x", config)
    assert [(file.name, file.read_bytes()) for file in sorted(cell.iterdir())] == [(name, b"mine") for name in names]


def test_of_two_commands_one_gets_an_empty_folder(workplace):
    """Both have seen that it is empty."""
    (workplace / "out").mkdir()
    script = "import sys; from pdvit.tracking.run_directory import RunDirectory; sys.stdin.read(1); "
    script += "RunDirectory.create('out', '', sys.argv[1])"
    commands = [[sys.executable, "-c", script, str(number)] for number in range(8)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) for command in commands]
    for process in started:
        process.stdin.close()
    ended = [process.wait(60) for process in started]
    assert sorted(ended) == [0] + 7 * [1]
    assert (workplace / "out/run.toml").read_text() == str(ended.index(0))


def test_default_names_get_a_suffix():
    paths = [RunDirectory.create(None, "digits-paper", "").path.as_posix() for _ in range(3)]
    assert paths == ["runs/digits-paper", "runs/digits-paper-2", "runs/digits-paper-3"]


def test_only_a_run_can_be_opened(workplace):
    with refused("not a run directory"):
        find_run(workplace)
    (workplace / "run.toml").touch()
    assert find_run(workplace) == workplace


@pytest.fixture
def directory():
    return RunDirectory.create("run", "unused", "")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_disappears_gets_no_ghost(directory, replaced):
    with directory.locked():
        directory.write("status.json", {"step": 1})
        directory.path.rename("moved")
        if replaced:
            directory.path.mkdir()
        for write in (lambda: directory.write("status.json", {}), lambda: directory.append({"step": 2})):
            with pytest.raises(RunFailed, match="gone or is another folder"):
                write()
    assert [*directory.path.glob("*")] == []
    assert directory.path.exists() == replaced


def test_what_a_killed_process_left_is_removed_when_the_run_goes_on(directory):
    left = [directory.path / name for name in (".status.json.0123abcd", "checkpoints/.last.00000000")]
    for path in left:
        path.write_text("torn")
    (directory.path / "checkpoints/.step-00000003").mkdir()
    names = (".notes", "run.toml", ".step-00000003", ".backup.20240115", ".report.html.0123abcd", "analysis")
    kept = [directory.path / name for name in (*names, ".status.json.01234567", "analysis/.status.json.0123abcd")]
    for path in kept:
        path.mkdir() if path.name in ("analysis", ".status.json.01234567") else path.touch()
    with directory.locked():
        assert {*directory.path.rglob("*")} == {
            *kept,
            *(directory.path / at for at in ("checkpoints", "checkpoints/.lock")),
        }


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[1]", b"3"])
def test_json_that_is_missing_or_damaged_is_an_error(directory, content):
    if content is not None:
        (directory.path / "summary.json").write_bytes(content)
    with refused("summary.json can't be read"):
        directory.read_json("summary.json")


def test_a_file_that_can_not_be_written_is_an_error(directory):
    (directory.path / "summary.json").mkdir()
    with refused("summary.json can't be written"):
        directory.write("summary.json", {})
    assert {path.name for path in directory.path.iterdir()} == {"summary.json", "run.toml", "checkpoints"}


def test_a_record_is_one_line_and_numbers_that_are_not_finite_are_null(directory):
    nan, text = float("nan"), "a\u2028b\x85c ž"
    directory.append({"step": 1, "loss": nan, "list": [1.0, -float("inf"), [nan]], "text": text, "time": {"s": nan}})
    directory.append({"step": 1, "accuracy": 1.0})
    before = (directory.path / "metrics.jsonl").read_bytes()
    assert directory.cut_records(1) == 2
    assert (directory.path / "metrics.jsonl").read_bytes() == before
    assert [json.loads(line) for line in before.decode().split("\n")[:-1]] == [
        {"step": 1, "loss": None, "list": [1.0, None, [None]], "text": text, "time": {"s": None}},
        {"step": 1, "accuracy": 1.0},
    ]


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', "\0\0\0\0", "3", '{"kind": "odd"}'])
def test_cutting_drops_a_line_that_is_no_record(directory, torn):
    for step in (1, 2, 3):
        directory.append({"kind": "eval", "step": step})
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert directory.cut_records(1) == 1
    directory.append({"kind": "eval", "step": 2})
    assert read_records(directory.path) == [{"kind": "eval", "step": step} for step in (1, 2)]


def test_a_file_is_written_whole_or_not_at_all(workplace):
    write_file(workplace / "file", "before")
    with pytest.raises(UnicodeEncodeError):
        write_file(workplace / "file", "\ud800")
    assert (workplace / "file").read_text() == "before"
    write_file(workplace / "file", b"after")
    assert (workplace / "file").read_text() == "after"
    assert [path.name for path in workplace.iterdir()] == ["file"]
