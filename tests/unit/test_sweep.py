import json
import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path

import pytest

from pdvit.sweep import CellState, Folder, make_cells, numbers
from pdvit.tracking.run_directory import RunDirectory
from tests.errors import refused
from tests.files import read_csv
from tests.processes import held_elsewhere

BASE = {"data": {"batch_size": 16}, "model": {"depth": 2}}
SHORT = {"optim": {"epochs": "3st"}}
A = {"name": "a"}
TABLE = {"run.seed": [0, 1], "variant": [A, {"name": "b", "model.depth": 3}]}
A0, B0, A1, B1 = "a-seed=0", "b-seed=0", "a-seed=1", "b-seed=1"


def cells_of(text: str):
    base = tomllib.loads(text)
    table = base.pop("sweep")
    return make_cells(base or BASE, table, "a.toml")


def test_lists_are_crossed():
    cells = cells_of('[sweep]\n"optim.lr" = [1e-3, 1]\n"model.width" = [16, 32]\n')
    assert [(cell.config.optim.lr, cell.config.model.width) for cell in cells] == [*product((0.001, 1.0), (16, 32))]
    assert [cell.name for cell in cells] == ["lr=0.001-width=16", "lr=0.001-width=32", "lr=1-width=16", "lr=1-width=32"]
    assert cells[1].values == {"optim.lr": 0.001, "model.width": 32}
    assert all(cell.config.data.batch_size == 16 and cell.variant == "" for cell in cells)


def test_variants_are_bundles_and_seeds_the_outermost_loop():
    cells = cells_of(
        '[sweep]\n"optim.lr" = [1e-3]\n"run.seed" = [0, 1]\n'
        '[[sweep.variant]]\nname = "baseline"\n"diversity.preset" = "none"\n"optim.opt" = "sgd"\n'
        '[[sweep.variant]]\nname = "paper"\n'
    )
    assert [(cell.config.run.seed, cell.variant) for cell in cells] == [*product((0, 1), ("baseline", "paper"))]
    assert cells[0].name == "baseline-lr=0.001-seed=0"
    assert (cells[0].config.diversity.preset, cells[0].config.optim.opt) == ("none", "sgd")
    assert (cells[1].config.diversity.preset, cells[1].config.optim.opt) == ("paper", "adamw")
    assert list(cells[0].values) == ["optim.lr", "run.seed"]


def test_a_value_may_name_what_the_cell_has():
    cells = cells_of("""
        [model]
        init = "runs/{variant}-seed={run.seed}/{optim.lr}{other}"
        [data]
        source = "wds/x-{000..100}.tar"
        [sweep]
        "run.seed" = [1, 2]
        [[sweep.variant]]
        name = "a"
        [[sweep.variant]]
        name = "b"
        "data.train_split" = "{variant}"
    """)
    ends = ["a-seed=1", "b-seed=1", "a-seed=2", "b-seed=2"]
    assert [cell.config.model.init for cell in cells] == [f"runs/{end}/{{optim.lr}}{{other}}" for end in ends]
    assert {cell.config.data.source for cell in cells} == {"wds/x-{000..100}.tar"}
    assert [cell.config.data.train_split for cell in cells] == [None, "b", None, "b"]


def test_seeds_that_are_added_come_last():
    text = '[sweep]\n"model.width" = [16, 32]\n"run.seed" = [0{}]\n'
    before, after = cells_of(text.format("")), cells_of(text.format(", 1"))
    assert after[: len(before)] == before


def test_names_can_be_read_are_folders_and_have_the_section_if_two_keys_are_alike():
    values = {"run.tf32": "true", "data.source": '"~/some where/x.tar"', "optim.warmup": '"5%"'}
    values |= {"augment.scale": "[0.5, 1]"}
    cells = [cells_of(f'[sweep]\n"{key}" = [{value}]\n') for key, value in values.items()]
    names = ["tf32=true", "source=some_where_x.tar", "warmup=5%", "scale=0.5_1"]
    assert [cell.name for (cell,) in cells] == names
    (cell,) = cells_of('[sweep]\n"model.width" = [16]\n"segment.width" = [32]\n"optim.lr" = [1]\n')
    assert cell.name == "model.width=16-segment.width=32-lr=1"


@pytest.mark.parametrize(
    ("text", "what", "where", "tip"),
    [
        ('[sweep]\n"optim.lrr" = [1]', "no key 'optim.lrr'", "cell 1 (lrr=1) of [sweep] of a.toml", "'optim.lr'"),
        ('[sweep]\n"optim.lr" = [1, -1]', "-1.0 is out of range", "cell 2 (lr=-1)", "above 0"),
        ('[sweep]\n"optim.min_lr" = [0, 1]', "is above the peak", "cell 2 (min_lr=1)", "lower it"),
        ('[sweep]\n"optim.lr" = 1', "needs a list", "[sweep] of a.toml", "for example"),
        ('[sweep]\n"optim.lr" = [0.1, 0.10]', "two cells would be named 'lr=0.1'", "a.toml", "leave one out"),
        ("[sweep]\noptim.lr = [0.1]", "'optim' is a section", "a.toml", '"optim.lr" = ...'),
        ("[sweep]\nlr = [0.1]", "'lr' is not section.key", "a.toml", "for example"),
        ("[sweep.variant]\nname = 'a'", "'variant' is no key", "a.toml", "[[sweep.variant]]"),
        ('[[sweep.variant]]\n"optim.lr" = 1', "variant 1 has no name", "a.toml", "name ="),
        ('[[sweep.variant]]\nname = "a/b"', "'a/b' is no name", "a.toml", "letters"),
        ('[[sweep.variant]]\nname = "a"\n[[sweep.variant]]\nname = "a"', "two variants", "a.toml", "rename"),
        ('[sweep]\n"run.out" = ["a", "b"]', "'run.out' can't be swept", "a.toml", "outside of [sweep]"),
        ('[sweep]\n"launch.time" = ["1h"]', "'launch.time' can't be swept", "a.toml", "outside of [sweep]"),
        ('[sweep]\n"optim.lr" = [1]\n[[sweep.variant]]\nname = "a"\n"optim.lr" = 1', "sets it too", "a.toml", "one of"),
        ('[sweep]\n"data.source" = ["a/b", "a b"]', "two cells would be named 'source=a_b'", "a.toml", "variant"),
        ("[sweep]", "is empty", "a.toml", "for example"),
        ("sweep = 3", "is empty", "a.toml", "for example"),
        ("[sweep]\nvariant = []", "a cell would have no name", "a.toml", "run.seed"),
        ('[[sweep.variant]]\nname = "jobs"', "'jobs', as a file of the sweep", "a.toml", "otherwise"),
        (f'[sweep]\n"data.source" = ["{"a" * 300}"]', "too long", "a.toml", "variant"),
    ],
)
def test_a_sweep_that_can_not_be_run_is_refused_as_a_whole(text, what, where, tip):
    with refused(what, where, tip):
        cells_of(text)


def test_cells_are_chosen_by_number_and_those_that_are_not_there_are_refused():
    found = {"3": {3}, "3-5": {3, 4, 5}, "1, 4,6-": {1, 4, 6, 7}, "2 - 3": {2, 3}, "7-": {7}}
    assert {text: numbers(text, 7) for text in found} == found
    for text in ("8", "0-3", "5-3", "6-9", "", "a", "3-4-5", "-3", "1,,2"):
        with refused(where="--cells"):
            numbers(text, 7)


def begin(path: Path, base=SHORT, table=TABLE) -> Folder:
    folder = Folder(path)
    folder.begin(base, table, make_cells(base, table, "x.toml"))
    return folder


@pytest.fixture
def folder(tmp_path) -> Folder:
    return begin(tmp_path / "sweep")


def put(folder: Folder, name: str, status: str | None = None, **files: dict) -> Path:
    run = folder.path / name
    run.mkdir(exist_ok=True)
    (run / "run.toml").write_text("")
    environment = {"processor": "CPU X", "cores": 4, "device": "cpu", "commit": "abc"}
    (run / "environment.json").write_text(json.dumps(environment | files.get("environment", {})))
    if status:
        (run / "status.json").write_text(json.dumps({"status": status} | files.get("facts", {})))
    if status == "finished":
        summary = {"task": "classification", "accuracy": 0.5, "loss": 1.0, "seconds": 3.5, "seconds_by_phase": {}}
        (run / "summary.json").write_text(json.dumps(summary | files.get("summary", {})))
    return run


def table(folder: Folder) -> list[dict[str, str]]:
    folder.write_table({})
    return read_csv(folder.path / "cells.csv")


def test_the_table_says_what_the_run_directories_say(folder):
    states = {cell.name: state.status for cell, state in folder.write_table({B0: "RUNNING", A1: "PENDING"})}
    assert states == {A0: "waiting", B0: "running", A1: "waiting", B1: "waiting"}
    put(folder, A0, "finished", summary={"similarity_last": None, "skipped": "x.png"})
    put(folder, B0, "failed", facts={"reason": "loss was infinite"}, environment={"device": "GPU Y"})
    put(folder, A1, "running")
    rows = table(folder)
    columns = ["cell", "name", "variant", "run.seed", "status", "reason", "seconds", "commit", "hardware"]
    assert list(rows[0]) == [*columns, "accuracy", "loss"]
    assert [row["cell"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["status"] for row in rows] == ["finished", "failed", "stopped", "waiting"]
    assert rows[0] | {"accuracy": "0.5", "seconds": "3.5", "commit": "abc", "hardware": "CPU X, 4 cores"} == rows[0]
    assert (rows[1]["reason"], rows[1]["hardware"], rows[1]["accuracy"]) == ("loss was infinite", "GPU Y", "")
    assert (rows[3]["variant"], rows[3]["run.seed"], rows[3]["commit"]) == ("b", "1", "")


def test_a_look_at_a_cell_never_keeps_others_from_training_it(folder):
    (put(folder, A0) / "checkpoints").mkdir()
    code = "import sys; from pathlib import Path; from pdvit.sweep import Folder; folder = Folder(Path(sys.argv[1]))\n"
    code += f"while True: folder.state('{A0}', {{}}); print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE) as looking:
        for _ in range(1000):
            with RunDirectory(folder.path / A0).locked():
                looking.stdout.readline()
        looking.kill()


def test_a_run_that_was_killed_is_told_from_one_that_runs(folder):
    run = put(folder, A0, "running")
    put(folder, B0)  # killed before its first status
    assert folder.state(A0, {}) == folder.state(B0, {}) == CellState("stopped", "interrupted")
    with held_elsewhere(run):
        assert folder.state(A0, {}) == CellState("running")
    assert folder.state(A0, {A0: "RUNNING"}) == CellState("running")
    assert folder.state(A0, {A0: "PENDING"}) == CellState("waiting")
    put(folder, B0, "finished")
    assert folder.state(B0, {B0: "COMPLETING"}) == CellState("finished")


def test_a_sweep_that_goes_on_may_have_more_cells(folder):
    more = TABLE | {"run.seed": [0, 1, 2], "variant": [*TABLE["variant"], {"name": "c"}]}
    assert folder.read_cells() == make_cells(SHORT, TABLE, "x.toml")
    assert len(begin(folder.path, table=more).read_cells()) == 9
    assert begin(folder.path, table=more).read_cells() == folder.read_cells()
    assert len(table(folder)) == 9


def test_of_cells_that_never_began_a_mistake_can_be_mended(folder):
    put(folder, A0)
    changed = TABLE | {"run.seed": [0, 2], "variant": [A, {"name": "b", "model.depth": 4}]}
    assert [cell.name for cell in begin(folder.path, table=changed).read_cells()] == [A0, B0, "a-seed=2", "b-seed=2"]


def test_damaged_files_fail_a_cell_or_leave_its_columns_empty(folder):
    (put(folder, A0, "finished") / "environment.json").write_text("{")
    put(folder, B0, "finished")
    (put(folder, A1, "finished") / "summary.json").write_text("{")
    rows = table(folder)
    assert [(row["accuracy"], row["commit"]) for row in rows[:2]] == [("0.5", ""), ("0.5", "abc")]
    assert folder.state(A1, {}).status == "failed"


@pytest.mark.parametrize(
    ("base", "changed", "what"),
    [
        ({"optim": {"epochs": "4st"}}, TABLE, "optim.epochs was '3st', is '4st'"),
        (SHORT, TABLE | {"run.seed": [0, 2]}, "'a-seed=1', which is no longer in the file"),
        (
            SHORT,
            TABLE | {"variant": [A, {"name": "b", "model.depth": 4}]},
            "'b-seed=0' is another run now: model.depth",
        ),
    ],
)
def test_a_sweep_that_changed_is_refused(folder, base, changed, what):
    before = (folder.path / "sweep.toml").read_text()
    for name in (A0, B0, A1, B1):
        put(folder, name)
    with refused(what, tip="--out"):
        begin(folder.path, base, changed)
    assert (folder.path / "sweep.toml").read_text() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    (tmp_path / "file").touch()
    for name in ("there", "file"):
        with refused("the path exists already"):
            begin(tmp_path / name)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["x"]
    (tmp_path / "empty" / "jobs").mkdir(parents=True)  # of a command that ended before it wrote sweep.toml
    begin(tmp_path / "empty")
