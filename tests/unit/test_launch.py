"""Jobs with commands in the place of Slurm's that write down what they are asked, and runs that take no time."""

import os
import re
import signal
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from pdvit.config import Config
from pdvit.config.schema import LaunchConfig
from pdvit.engine.terminal import StopRequest
from pdvit.errors import RunFailed, UserError
from pdvit.launch import POLL_SECONDS, Jobs, RunJob
from pdvit.tracking.run_directory import RunDirectory
from pdvit.workflows import runs
from tests.docs.pages import read
from tests.processes import wait

PROGRAMS = {
    "sbatch": "/bin/cp \"$1\" sent.sh; echo 'Submitted batch job 12'",
    "squeue": "echo '12_0 RUNNING'; echo '12_1 PENDING'; echo '7 RUNNING'",
    "srun": "true",
    "scancel": 'echo "$@" >> cancelled',
}


@pytest.fixture
def slurm(workplace, monkeypatch) -> Path:
    """A folder of programs that stand for Slurm's."""
    programs = workplace / "bin"
    programs.mkdir()
    for name, script in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    return programs


class QuickJob(RunJob):
    def train(self, stop) -> int:
        """End as the name of the run says."""
        run = self.run
        run.mkdir(exist_ok=True)
        (run / "status.json").write_text('{"status": "running", "step": 3}')
        errors = {"refused": UserError("the disk is full", "", ""), "broken": RunFailed("not finite", "")}
        if run.name in ("refused", "broken", "bug"):
            raise errors.get(run.name, ValueError("a\nbug"))
        if run.name in ("saved", "too-short", "early"):
            signal.raise_signal(signal.SIGTERM if run.name == "early" else signal.SIGUSR2)
            if run.name == "saved":
                (run / "run.toml").touch()
                (run / "checkpoints").mkdir()
                (run / "checkpoints" / "last").write_text("step-00000003")
            return 75
        if run.name == "cancelled":
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("a worker is gone")
        (run / "environment").write_text(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ['RANK']}")
        return 0


def jobs(folder: Path, **names: str) -> dict[str, RunJob]:
    return {name: QuickJob(Config(), folder / run) for name, run in names.items()}


SETTINGS = LaunchConfig("slurm", 2, 8, 6, "64G", "4h", "5min", "gpu", "lab", "a100", 3, {"qos": "high"})


def test_the_settings_are_in_the_file_for_sbatch_and_the_jobs_are_an_array(slurm, workplace):
    (workplace / "sweep").mkdir()
    found = Jobs(workplace / "sweep")
    with found.locked():
        waiting = jobs(workplace, a="one", b="two", c="three")
        assert found.start(SETTINGS, waiting) == ["a", "b", "c"]
        assert not waiting
    sent = Path("sent.sh").read_text()
    for option in (
        *("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=6", "--mem=64G", "--time=240"),
        *("--signal=USR2@300", "--partition=gpu", "--account=lab", "--constraint=a100", "--array=0-2%3", "--qos=high"),
        *("--requeue", "--job-name=pdvit-sweep"),
    ):
        assert f"#SBATCH {option}\n" in sent
    assert "--wait=60 --cpus-per-task=6" in sent
    assert found.ids() == {name: ("slurm", f"12_{number}", None) for number, name in enumerate("abc")}
    assert found.states() == {"a": "RUNNING", "b": "PENDING"}
    assert found.log("c").name == "12_2_0_log.out"
    assert found.cancel() == ["a", "b"]
    assert Path("cancelled").read_text() == "12_0\n12_1\n"


def test_the_docs_show_the_file_that_is_made(slurm, workplace):
    (workplace / "big").mkdir()
    found, launch = Jobs(workplace / "big"), LaunchConfig("slurm", 2, 8, 12, "400G", "24h", partition="gpu")
    with found.locked():
        found.start(launch, jobs(workplace, run="big"))
    sent = Path("sent.sh").read_text().replace(str(workplace / "big"), "/shared/runs/big")
    shown = re.search(r"```\n(#!/bin/bash.*?)```", read("docs/cluster.md"), re.DOTALL)[1]
    assert sent.strip() == shown.replace("/home/me/env/bin/python", sys.executable).strip()


@pytest.mark.parametrize(
    ("settings", "broken", "what"),
    [
        ({}, ("sbatch", None), "Slurm's sbatch is not here"),
        ({}, ("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1"), "Unable to contact slurm controller"),
        (
            {"partition": "nowhere"},
            ("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid partition' >&2; exit 1"),
            "sbatch: Batch job submission failed: Invalid partition",
        ),
        ({"time": "90s", "grace": "2min"}, None, "a job of 90s has no time for a checkpoint"),
        ({"time": "30s", "grace": "1s"}, None, "a job of 30s has no time for a checkpoint"),
    ],
)
def test_what_can_not_be_submitted_is_an_error_and_leaves_no_job(slurm, workplace, settings, broken, what):
    found, launch = Jobs(workplace), LaunchConfig(**{"launcher": "slurm"} | settings)
    if broken and broken[1]:
        (slurm / broken[0]).write_text(f"#!/bin/sh\n{broken[1]}\n")
    elif broken:
        (slurm / broken[0]).unlink()
    with found.locked(), pytest.raises(UserError) as caught:
        found.start(launch, jobs(workplace, run="one"), [None]) and found.states()
    assert caught.value.what == what
    assert not found.ids() or broken[0] == "squeue"


def test_following_ends_with_squeue_and_a_refused_job_leaves_no_files(slurm, workplace, refusal, monkeypatch):
    (workplace / "mine" / ".git").mkdir(parents=True)
    (slurm / "tail").symlink_to("/usr/bin/tail")
    (slurm / "squeue").write_text("#!/bin/sh\n[ -e seen ] && echo down >&2 && exit 1\n: > seen; echo 12 RUNNING")
    monkeypatch.setitem(POLL_SECONDS, "slurm", 0.1)
    assert refusal("train", "--launcher", "slurm", "--follow", "--out", "run").what == "down"
    (slurm / "sbatch").unlink()
    assert "sbatch is not here" in refusal("train", "--launcher", "slurm", "--out", "mine").what
    assert [path.name for path in (workplace / "mine").iterdir()] == [".git"]


@pytest.mark.parametrize(
    ("run", "status", "requeued", "written"),
    [
        ("well", 0, False, "running"),
        ("saved", 75, True, "running"),
        ("too-short", 1, False, "no step was saved in a job of 1h"),
        ("refused", 1, False, "the disk is full"),
        ("broken", 1, False, "not finite"),
        ("bug", 1, False, "ValueError: a bug"),
        ("cancelled", 75, False, "interrupted"),
        ("early", 75, False, "SIGTERM"),
    ],
)
def test_a_job_is_queued_again_after_a_checkpoint(workplace, monkeypatch, run, status, requeued, written):
    names = ["MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    environment = dict.fromkeys([*names, "CUDA_VISIBLE_DEVICES"], "0")  # so that they are reset after the test
    environment |= {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_LOCAL_NTASKS": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: signals.append(number))  # submitit's
    monkeypatch.setattr(time, "monotonic", count(0, 1800).__next__)
    try:
        with pytest.raises(SystemExit) as caught:
            QuickJob(Config(), workplace / run, devices="3,4")()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (caught.value.code, bool(signals)) == (status, requeued)
    found = RunDirectory(workplace / run).read_json("status.json")
    assert (written in (found["status"], found.get("reason")), found["step"]) == (True, 3)
    if run == "well":
        assert (workplace / run / "environment").read_text() == "3,4 0"


def test_a_job_that_is_queued_again_has_the_workers_of_its_cpus(run_copy, monkeypatch):
    (run_copy / "summary.json").unlink()
    monkeypatch.setattr(runs, "train_to_end", lambda prepare, *more: prepare(*more).trainer.task.loader.worker_count)
    assert RunJob(Config(launch=LaunchConfig(cpus=3)), run_copy).train(StopRequest()) == 3


def test_jobs_of_this_machine_are_found_until_they_end(workplace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # of `QuickJob`, which is pickled by its name
    found = Jobs(workplace)
    with found.locked():
        waiting = jobs(workplace, a="well", b="good", c="fine")
        assert found.start(LaunchConfig("local"), waiting, ["7", None]) == ["a", "b"]
        assert os.readlink(f"/proc/{found.ids()['a'][1]}/fd/1") == os.devnull  # a pipe would wait for the job
        wait(lambda: not [*found.start(LaunchConfig("local"), waiting, ["7", None]), *waiting, *found.states()], found)
    texts = {name: (workplace / name / "environment").read_text() for name in ("well", "good", "fine")}
    assert (texts["well"], texts["good"]) == ("7 0", "None 0")
    assert (found.ids()["c"][0], found.cancel()) == ("local", [])
    assert "Starting with JobEnvironment" in found.log("a").read_text()
