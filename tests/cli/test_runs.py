"""What the commands that train share."""

from pathlib import Path

import pytest

from pdvit.cli.change import with_change_tips
from pdvit.cli.sweep import devices_of
from pdvit.errors import UserError
from pdvit.sweep import make_cells


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
    error = with_change_tips(UserError("what", where, tip), Path("runs/a"), "AGAIN")
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
