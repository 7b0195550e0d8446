import json
import os

import pytest

from pdvit.errors import UserError
from pdvit.tracking import RunDirectory, newest, write_file


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(directory):
    return [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]


def test_a_place_that_exists_is_refused_and_a_link_not_followed(workplace):
    (workplace / "taken").mkdir()
    (workplace / "taken/file").touch()
    (workplace / "link").symlink_to(workplace / "nowhere")
    for place, can_be_resumed in (("taken", True), ("taken/file", False), ("link", False)):
        with pytest.raises(UserError, match="exists") as caught:
            RunDirectory.create(place, "unused")
        assert ("--resume" in caught.value.tip) == can_be_resumed
    assert not (workplace / "nowhere").exists()


def test_default_names_get_a_suffix():
    paths = [RunDirectory.create(None, "digits-paper").path.as_posix() for _ in range(3)]
    assert paths == ["runs/digits-paper", "runs/digits-paper-2", "runs/digits-paper-3"]


@pytest.mark.parametrize(("out", "name"), [("", "unused"), (None, ""), (None, ".."), (None, "a/b")])
def test_what_is_not_a_name_is_refused(out, name):
    with pytest.raises(UserError, match="not a name"):
        RunDirectory.create(out, name)


@pytest.mark.parametrize("out", ["file/run", "/proc/run", "x" * 300])
def test_a_place_that_can_not_be_written_is_refused(workplace, out):
    (workplace / "file").touch()
    with pytest.raises(UserError, match="run directory can't be written") as caught:
        RunDirectory.create(out, "unused")
    assert "--out" in caught.value.tip


def test_a_folder_of_runs_that_can_not_be_made_is_refused(workplace):
    (workplace / "runs").symlink_to(workplace / "nowhere")
    with pytest.raises(UserError, match="run directory can't be written"):
        RunDirectory.create(None, "name")


def test_only_a_run_can_be_opened(workplace):
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory.open(workplace)
    (workplace / "run.toml").touch()
    assert RunDirectory.open(workplace).path == workplace


@pytest.fixture
def directory():
    return RunDirectory.create("run", "unused")


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[1]", b"3"])
def test_json_that_is_missing_or_damaged_is_refused(directory, content):
    if content is not None:
        (directory.path / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"summary\.json can't be read"):
        directory.read_json("summary.json")


def test_a_file_that_can_not_be_written_is_refused(directory):
    (directory.path / "summary.json").mkdir()
    with pytest.raises(UserError, match=r"summary\.json can't be written"):
        directory.write_json("summary.json", {})
    assert [path.name for path in directory.path.iterdir()] == ["summary.json"]


def test_a_record_is_one_line_and_numbers_that_are_not_finite_are_null(directory):
    nan, infinite = float("nan"), float("inf")
    directory.append("train", {"step": 1, "loss": nan, "list": [1.0, -infinite, [nan]], "text": "a\u2028b\x85c ž"})
    directory.append("eval", {"step": 1, "accuracy": 1.0}, {"seconds": 2.0})
    before = (directory.path / "metrics.jsonl").read_bytes()
    assert directory.cut_records(1) == 2
    assert (directory.path / "metrics.jsonl").read_bytes() == before
    assert [json.loads(line) for line in before.decode().split("\n")[:-1]] == [
        {"kind": "train", "step": 1, "loss": None, "list": [1.0, None, [None]], "text": "a\u2028b\x85c ž"},
        {"kind": "eval", "step": 1, "accuracy": 1.0, "time": {"seconds": 2.0}},
    ]


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind"', "{", "\0\0\0\0", "3", '{"kind": "odd"}'])
def test_cutting_drops_a_line_that_is_no_record(directory, torn):
    for step in (1, 2, 3):
        directory.append("train", {"step": step})
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert directory.cut_records(1) == 1
    assert [record["step"] for record in lines(directory)] == [1]
    directory.append("train", {"step": 2})
    assert [record["step"] for record in lines(directory)] == [1, 2]


def test_the_newest_come_first(workplace):
    for name, age in (("old", 100), ("new", 300), ("middle", 200)):
        file = workplace / "runs" / name / "analysis.csv"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (age, age))
    (workplace / "runs/other").mkdir()
    (workplace / "runs/odd/analysis.csv").mkdir(parents=True)
    assert [path.name for path in newest("analysis.csv")] == ["new", "middle", "old"]


def test_a_file_is_written_whole_or_not_at_all(workplace):
    write_file(workplace / "file", "before")
    with pytest.raises(UnicodeEncodeError):
        write_file(workplace / "file", "\ud800")
    assert (workplace / "file").read_text() == "before"
    write_file(workplace / "file", b"after")
    assert (workplace / "file").read_text() == "after"
    assert [path.name for path in workplace.iterdir()] == ["file"]
