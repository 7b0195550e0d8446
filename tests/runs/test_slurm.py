"""Runs and sweeps on a real Slurm cluster of one machine, which tests/slurm.sh starts.

Two GPUs of the cluster exist in name only, so that two processes of a run can be asked for: they train on the CPU.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files import assert_same, read_csv, read_json
from tests.processes import finish, start, wait

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "slurm.sh"
TINY = """
data = { img_size = 16, batch_size = 16 }
model = { depth = 2, width = 16, heads = 1, patch_size = 8 }
optim = { epochs = "STEPSst", warmup = "1st" }
checkpoint = { every = "50st" }
run = { log_every = "50st", eval_every = "1000st" }
"""
SWEEP = """
[sweep]
"run.seed" = [0, 1]
variant = [{ name = "none", "diversity.preset" = "none" }, { name = "paper" }, { name = "third", THIRD }]
"""
STEPS = 2000
SLURM = ("--launcher", "slurm")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SCRIPT, "start", folder], stderr=subprocess.PIPE, text=True)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        run("scancel", "--user=root")
    subprocess.run([SCRIPT, "stop", folder], check=True)


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def pdvit(*words: object, status: int = 0) -> str:
    return finish(start(*words), status)


def launch(*words: object) -> str:
    """Submit a run and return the number of its job."""
    return re.search(r"slurm (\d+)", pdvit("train", *words, *SLURM))[1]


def job(number: str, name: str) -> str:
    return re.search(rf"\b{name}=(\S+)", run("scontrol", "show", "job", number))[1]


def end_of(number: str) -> str:
    """Wait for the end of a job and return its state."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait(lambda: job(number, "JobState") in ended, number)
    return job(number, "JobState")


def written(run: Path) -> bool:
    return (run / "checkpoints" / "last").is_file()


@pytest.fixture(scope="module")
def place(tmp_path_factory, cluster) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("work")
        patch.chdir(place)
        (place / "tiny.toml").write_text(TINY.replace("STEPS", str(STEPS)))
        yield place


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """A run that nobody disturbs, without a launcher."""
    pdvit("train", "--config", "tiny.toml", "--out", "whole")
    return place / "whole"


def test_a_run_that_hits_its_time_limit_three_times_has_the_tensors_of_an_undisturbed_one(place, whole):
    """A job has at most 50 seconds: Slurm counts minutes, and signals 10 to 40 seconds before the limit."""
    steps = int(140 * read_json(whole / "summary.json")["steps"] / read_json(whole / "summary.json")["seconds"])
    words = ["--config", "tiny.toml", "--epochs", f"{steps}st", "--out"]
    number = launch(*words, "limited", "--time", "1min", "--grace", "10s")
    assert end_of(number) == "COMPLETED"
    assert int(job(number, "Restarts")) >= 3
    pdvit("train", *words, "undisturbed")
    assert_same(place / "limited", place / "undisturbed")


DISTURBANCES = {
    "requeued by hand": [["scontrol", "requeue", "{}"]],
    "preempted": [["srun", "--partition=urgent", "--exclusive", "true"]],
    "node failed": [
        ["scontrol", "update", "NodeName=localhost", "State=DOWN", "Reason=test"],
        ["scontrol", "update", "NodeName=localhost", "State=RESUME"],
    ],
}


@pytest.mark.parametrize("how", DISTURBANCES)
def test_a_job_that_has_to_leave_is_queued_again_and_goes_on(place, whole, how):
    folder = place / how.replace(" ", "-")
    number = launch("--config", "tiny.toml", "--out", folder)
    wait(lambda: written(folder), folder)
    for command in DISTURBANCES[how]:
        run(*(word.format(number) for word in command))
    wait(lambda: job(number, "Restarts") == "1", number)
    assert end_of(number) == "COMPLETED"
    assert "resuming after step" in (folder / "jobs" / f"{number}_0_log.out").read_text()
    assert_same(folder, whole)


def test_a_cancelled_run_is_saved_and_can_be_resumed(place, whole):
    folder = place / "cancelled"
    again = ["--config", "tiny.toml", "--out", folder]
    number = launch(*again, "--sbatch", "hold=true")
    refused = pdvit("train", *again, *SLURM, status=2)
    assert f"job {number} of this run has not ended" in refused
    assert f"scancel {number}" in refused
    run("scontrol", "release", number)
    wait(lambda: written(folder), folder)
    run("scancel", number)
    assert end_of(number) == "CANCELLED"
    status = read_json(folder / "status.json")
    assert (status["status"], status["reason"]) == ("stopped", "SIGTERM")
    assert (folder / "checkpoints" / "last").read_text() == f"step-{status['step']:08d}"
    assert "test accuracy" in pdvit("train", "--resume", folder, *SLURM, "--follow")
    assert_same(folder, whole)


def test_two_tasks_are_two_ranks(place):
    words = ["--config", "tiny.toml", "--epochs", "200st", "--gpus", "2", "--follow", "--out"]
    assert "x 2 processes" in pdvit("train", *words, "two", *SLURM)
    pdvit("train", *words, "here", "--launcher", "local")
    assert_same(place / "two", place / "here")


def test_a_sweep_is_an_array_of_which_cells_can_fail(place, whole):
    (place / "six.toml").write_text(
        TINY.replace("STEPS", str(STEPS)) + SWEEP.replace("THIRD", '"diversity.koleo" = 1e38')
    )
    first = ["train", "--config", "six.toml", *SLURM, "--parallel", "2"]
    following = start(*first, "--follow")
    wait((place / "runs/six/jobs/jobs.json").is_file, "six")
    wait(lambda: written(place / "runs/six/none-seed=0"), "six")
    assert "6 cells in runs/six, 0 to run now" in pdvit(*first)
    listed = pdvit("sweep", "status", "runs/six")
    assert "none-seed=0   running   job " in listed
    assert "paper-seed=1  waiting   job " in listed
    assert "6 cells: 4 finished, 2 failed" in finish(following, 1)
    rows = read_csv(place / "runs/six/cells.csv")
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"] * 2
    assert_same(place / "runs/six/paper-seed=0", whole)


def test_ctrl_c_leaves_the_jobs_which_sweep_cancel_ends(place):
    (place / "long.toml").write_text(TINY.replace("STEPS", "100000") + SWEEP.replace("THIRD", '"optim.lr" = 1'))
    process = start("train", "--config", "long.toml", *SLURM, "--follow", "--cells", "1-2")
    folder = place / "runs/long/none-seed=0"
    wait(lambda: written(folder), folder)
    process.send_signal(signal.SIGINT)
    assert "pdvit sweep cancel runs/long" in finish(process, 75)
    assert "running   job" in pdvit("sweep", "status", "runs/long")
    assert "cancelled: 2 jobs" in pdvit("sweep", "cancel", "runs/long")
    wait(lambda: "job" not in pdvit("sweep", "status", "runs/long"), folder)
    assert "none-seed=0   stopped   SIGTERM" in pdvit("sweep", "status", "runs/long")


def test_what_slurm_refuses_is_an_error_and_the_same_command_works_afterwards(place):
    words = ["--config", "tiny.toml", "--epochs", "2st", "--out", place / "refused"]
    refused = pdvit("train", *words, *SLURM, "--partition", "nowhere", status=2)
    assert "sbatch: Batch job submission failed: Invalid partition name specified" in refused
    assert end_of(launch(*words)) == "COMPLETED"


def test_a_folder_that_the_machines_do_not_share_is_named(place):
    """Root of a private mount sees a folder that slurmd does not."""
    hidden = place / "hidden"
    hidden.mkdir()
    words = f"--config tiny.toml --out {hidden}/run --launcher slurm --follow"
    line = f"mount -t tmpfs none {hidden} && {sys.executable} -m pdvit train {words} 2>&1"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", line], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1, done.stdout
    assert "the job ended without output" in done.stdout
    assert "choose an --out on a disk that all share" in done.stdout
