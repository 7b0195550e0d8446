"""What the commands that train share."""

from pathlib import Path

import pytest

from pdvit.cli.runs.command import Command, Kind
from pdvit.cli.runs.recipe import as_change
from pdvit.cli.runs.resume import resume
from pdvit.cli.runs.start import start
from pdvit.cli.runs.sweep import devices_of
from pdvit.config import build
from pdvit.data.sources import open_source
from pdvit.engine.interrupts import stop_on_signals
from pdvit.errors import UserError
from pdvit.sweep import make_cells
from pdvit.tasks import ClassificationTask

SETTINGS = {
    "data": {"batch_size": 16, "img_size": 16},
    "model": {"depth": 2, "width": 16, "heads": 1, "patch_size": 8},
    "optim": {"epochs": "3st", "warmup": "1st"},
    "run": {"device": "cpu", "time_limit": "0.001s"},
}


def test_another_command_brings_its_task_and_its_words(tmp_path, capsys):
    class Other(ClassificationTask):
        def finish(self, network, weights):
            return super().finish(network, weights) | {"task": "other"}

    kind = Kind(
        open_source=lambda config, say: open_source(config.data, say),
        settle=lambda config, processes, device: config,
        make_task=Other,
        describe=lambda config, task: "something else",
        conclude=lambda summary: f"the {summary['task']} came out",
        use=lambda run: "somehow",
    )
    command = Command("other", lambda config: kind)
    out = tmp_path / "run"
    settings = SETTINGS | {"run": SETTINGS["run"] | {"out": str(out)}}
    with stop_on_signals() as stop:
        assert start(command, build(("test", settings)), False, stop) == 75
    shown = capsys.readouterr().out
    assert "something else; 3 steps of 16 images on cpu" in shown
    assert f"go on with: pdvit other --resume {out}" in shown
    with stop_on_signals() as stop:
        assert resume(command, str(out), ["run.time_limit=1h"], False, stop) == 0
    assert "the other came out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "tip", "new_where", "new_tip"),
    [
        ("run.device (--device)", "try --device cpu", "run.device of runs/a", "try --change run.device=cpu"),
        (
            "run.compile (--compile)",
            "use --compile, or not",
            "run.compile of runs/a",
            "--change run.compile=true, or not",
        ),
        ("optim.min_lr", "lower it", "optim.min_lr of runs/a", "lower it"),
        ("runs/a/run.toml", "a lower --lr, or more", "runs/a/run.toml", "a lower --change optim.lr=..., or more"),
        ("runs/a", "for --help and --json", "runs/a", "for --help and --json"),
        ("data.batch_size (--batch-size)", "choose a multiple of 2", "data.batch_size of runs/a", "within a run"),
        ("data.source (--data)", "did you mean 'digits'?", "data.source of runs/a", "AGAIN --change data.source=PATH"),
    ],
)
def test_flags_become_changes_where_a_run_is_resumed(where, tip, new_where, new_tip):
    error = as_change(UserError("what", where, tip), Path("runs/a"), "AGAIN")
    assert (error.what, error.where) == ("what", new_where)
    assert new_tip in error.tip


@pytest.mark.parametrize(
    ("devices", "gpus", "processes"),
    [
        (["auto", "cuda"], ["0", "1"], ["0", "1"]),
        (["auto", "cpu"], ["0", "1"], [None]),
        (["cuda:1", "auto"], ["0", "1"], [None]),
        (["auto"], ["3"], [None]),
        (["auto"], [], [None]),
    ],
)
def test_a_sweep_runs_one_cell_per_gpu_unless_a_cell_names_its_device(devices, gpus, processes):
    cells = make_cells({}, {"run.device": devices}, "x.toml")
    assert devices_of(cells, gpus) == processes
