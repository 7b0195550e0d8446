"""Several processes on the CPU (gloo) against one: the same recipe, the same total batch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.files import read_json
from tests.runs import spread_steps

STEPS, PATIENCE = 20, 300
MODEL = {"depth": 2, "width": 16, "heads": 1, "patch_size": 8}
SETTINGS = {
    "model": MODEL,
    "data": {"batch_size": 16, "img_size": 16},
    "augment": {"shift": 2},
    "optim": {"lr": 0.05, "warmup": "2st", "ema_decay": 0.9, "clip_grad": 1.0},
    "run": {"device": "cpu"},
}


def launch(processes, *arguments):
    """Run a module or script in so many processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=PATIENCE)


def steps(out, processes, settings, precision="short", count=STEPS):
    """Train some steps in so many processes (in this one, if it is one), and return tensors and numbers."""
    if processes == 1:
        spread_steps.main(out, settings, count, precision == "wide")
        torch.use_deterministic_algorithms(False)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, spread_steps.__file__, str(out), json.dumps(settings), str(count), precision]
    started = []
    for rank in range(processes if processes > 1 else 0):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | meeting | own))
    for process in started:
        errors = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0, errors[-3000:]
    tensors = {
        f"{file.stem}.{name}": value for file in out.glob("*.safetensors") for name, value in load_file(file).items()
    }
    return tensors, read_json(out / "numbers.json")


def furthest(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in theirs)


def assert_close(ours, theirs, bound):
    """Compare the weights and their average; the state of optimizers is not divided alike."""
    weights = [{name: v for name, v in run[0].items() if not name.startswith("state.")} for run in (ours, theirs)]
    assert furthest(*weights) <= bound


SCENES = {
    "data": {"source": "scenes", "batch_size": 8, "workers": 0},
    "segment": {"head": "upernet", "width": 8, "norm": "group", "crop": 32},
    "diversity": {"preset": "paper"},
    "augment": {},
}
SWIN = {"depths": [1, 1, 1, 2], "num_heads": [1, 2, 2, 4], "embed_dim": 8, "window_size": 2}
HIERARCHICAL = {  # hooks read first and last there, inside the wrapped module
    "model": {"name": "swin_tiny_patch4_window7_224", "args": SWIN, "drop_path": 0.0},
    "data": {"batch_size": 16, "img_size": 64},
}
MICRO = {"data": {"batch_size": 16, "img_size": 16, "micro_batch": 3}}
NO_EMA = {"lr": 0.001, "ema_decay": None}  # then the trained network is evaluated just before its state is saved


# The bounds of docs/design.md: SGD in float32 within 1e-6, AdamW in float64 within 1e-10.
@pytest.mark.parametrize(
    ("distribute", "optim", "precision", "bound", "sections", "count"),
    [
        ("ddp", {"opt": "sgd"}, "short", 1e-6, {}, STEPS),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("fsdp", {"opt": "sgd"}, "short", 1e-6, {}, STEPS),
                ("fsdp", {"opt": "adam"} | NO_EMA, "short", 1e-3, {}, STEPS),
                ("ddp", {"opt": "adamw"}, "wide", 1e-10, MICRO, STEPS),
                ("fsdp", {"opt": "adamw"}, "wide", 1e-10, MICRO, STEPS),
                ("ddp", {"opt": "sgd"}, "short", 1e-6, HIERARCHICAL, STEPS),
                ("fsdp", {"opt": "sgd"}, "short", 1e-6, HIERARCHICAL, STEPS),
                # Few steps: later, a ReLU of the head that rounding has put on the other side makes the difference.
                ("ddp", {"opt": "sgd"}, "short", 1e-6, SCENES, 4),
                ("fsdp", {"opt": "sgd"}, "short", 1e-6, SCENES, 4),
            ]
        ),
    ],
)
def test_two_processes_equal_one(tmp_path, distribute, optim, precision, bound, sections, count):
    optim = {name: value for name, value in (SETTINGS["optim"] | optim).items() if value is not None}
    settings = SETTINGS | sections | {"optim": optim}
    alone = steps(tmp_path / "one", 1, settings, precision, count)
    settings |= {"run": {"device": "cpu", "distribute": distribute}}
    both = steps(tmp_path / "two", 2, settings, precision, count)
    assert_close(both, alone, bound)
    for record_type, metrics in alone[1].items():
        for name, value in metrics.items():
            # A pixel whose two best classes are close may change its class.
            most = 1e-3 if sections is SCENES and record_type == "eval" else 1e-5
            if isinstance(value, float):
                assert both[1][record_type][name] == pytest.approx(value, rel=1e-4, abs=most), (record_type, name)


@pytest.mark.slow
def test_two_compiled_processes_equal_eager_ones(tmp_path):
    """The gradients of several parts, the last one short, add up before the processes exchange them."""
    settings = SETTINGS | MICRO | {"optim": SETTINGS["optim"] | {"opt": "sgd"}}
    eager, compiled = (
        steps(tmp_path / str(switch), 2, settings | {"run": {"device": "cpu", "compile": switch}})
        for switch in (False, True)
    )
    assert_close(compiled, eager, 1e-5)
    assert compiled[1]["train"] == pytest.approx(eager[1]["train"], rel=1e-4, abs=1e-5)


CLI = ["-m", "pdvit", "train", "--depth", "2", "--width", "16", "--heads", "1", "--patch-size", "8", "--img-size", "16"]
CLI += ["--batch-size", "16", "--device", "cpu"]
CLI += ["--log-interval", "5st", "--val-interval", "30st", "--save-every", "5st"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_the_command_runs_in_several_processes(tmp_path, records):
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(1, *CLI, "--epochs", "40st", "--out", str(one)).returncode == 0
    done = launch(2, *CLI, "--epochs", "40st", "--out", str(two))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test accuracy") == 1
    assert "x 2 processes" in done.stdout
    for ours, theirs in zip(records(two), records(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "class", "mixing", "accuracy"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3)
    # Evaluation counts every image exactly once: 237 do not divide by two.
    assert (read_json(two / "summary.json")["accuracy"] * 360) % 1 == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_two_processes_measure_a_segmentation_as_one_does(tmp_path, mask_folder):
    """Every labelled pixel once, though three images do not divide by two; what does not decode is left out."""
    run, once = tmp_path / "run", tmp_path / "once"
    segment = [*CLI[:2], "segment", "--data", str(mask_folder), *CLI[3:11], "--head-width", "8", "--crop", "32"]
    segment += ["--batch-size", "4", "--eval-mode", "whole", "--device", "cpu", "--workers", "0"]
    done = launch(2, *segment, "--epochs", "6st", "--out", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    labelled = sum(int((np.array(Image.open(file)) != 7).sum()) for file in (mask_folder / "masks/val").iterdir())
    assert sum(int(line.split(",")[1]) for line in (run / "iou.csv").read_text().splitlines()[1:]) == labelled
    for processes in (1, 2):
        done = launch(processes, "-m", "pdvit", "eval", str(run), "--device", "cpu", "--out", str(once))
        assert done.returncode == 0, done.stderr[-3000:]
        found, ended = read_json(once / "eval.json"), read_json(run / "summary.json")
        assert (found["processes"], found["images"]) == (processes, 3)
        for name in ("miou", "accuracy", "accuracy_mean"):
            assert found[name] == ended[name]
        assert found["loss"] == pytest.approx(ended["loss"], rel=1e-12)
        for file in (path.relative_to(run) for path in (run / "predictions").iterdir()):
            assert (once / file).read_bytes() == (run / file).read_bytes()
        assert (once / "iou.csv").read_bytes() == (run / "iou.csv").read_bytes()
    (mask_folder / "images/val/2.png").write_bytes(b"torn")
    skip = ["eval", str(run), "--device", "cpu", "--out", str(once), "--on-bad-image", "skip"]
    left = []
    for processes in (1, 2):
        done = launch(processes, "-m", "pdvit", *skip)
        assert done.returncode == 0, done.stderr[-3000:]
        left.append([read_json(once / "eval.json")[name] for name in ("images", "bad_images", "miou")])
    assert left[0] == left[1]
    assert left[0][:2] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "15"], "a batch of 15 can't be divided evenly among 2 processes"),
        (["--set", "optim.lrr=1"], "there is no key 'optim.lrr'"),  # before the processes meet
    ],
)
def test_an_error_of_all_processes_is_printed_once(tmp_path, flags, message):
    done = launch(2, *CLI, *flags, "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count(f"error: {message}") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_process_alone_is_in_the_summary(tmp_path):
    script = tmp_path / "other.py"
    script.write_text(
        "import os, sys\n"
        "from pdvit.cli import run\n"
        "sys.exit(run(sys.argv[1:] + (['--set', 'optim.lrr=1'] if os.environ['RANK'] == '1' else [])))\n"
    )
    done = launch(2, str(script), *CLI[2:], "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "UserError: there is no key 'optim.lrr'" in done.stderr.partition("Root Cause")[2]


@pytest.mark.slow
def test_the_signal_of_slurm_stops_all_processes_and_the_run_goes_on(tmp_path):
    """torchrun hands it on where it is told to, as docs/runs.md says."""
    run = tmp_path / "run"
    handled = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    command = [*TORCHRUN, *handled, *CLI, "--epochs", "4000st", "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while not (run / "checkpoints/last").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        shown, errors = process.communicate(timeout=PATIENCE)
    status = read_json(run / "status.json")
    assert (status["status"], status["reason"]) == ("stopped", "SIGUSR1"), errors[-3000:]
    assert f"pdvit train --resume {run}" in shown
    assert (run / "checkpoints/last").read_text() == f"step-{status['step']:08d}"


FAILING = """
import os, signal, sys
from pdvit.cli import run
from pdvit.tasks.classification import ClassificationTask
plain, steps = ClassificationTask.step, 0
def step(self, network, batch):
    global steps
    steps += 1
    if steps == 18 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, network, batch)
ClassificationTask.step = step
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_process_that_dies_ends_the_run_and_a_restart_resumes_it(tmp_path, records, restarts):
    script, whole, run = tmp_path / "failing.py", tmp_path / "whole", tmp_path / "run"
    script.write_text(FAILING)
    command = [*TORCHRUN, "--max-restarts", restarts, str(script), *CLI[2:], "--epochs", "40st", "--out", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    if restarts == "0":
        assert done.returncode != 0
        assert read_json(run / "status.json")["status"] in ("failed", "running")
        assert (run / "checkpoints/last").read_text() == "step-00000015"
        done = launch(2, "-m", "pdvit", "train", "--resume", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert launch(2, *CLI, "--epochs", "40st", "--out", str(whole)).returncode == 0
    assert records(run) == records(whole)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "resumed"), [(2, 1), (1, 2)])
def test_a_checkpoint_loads_on_another_number_of_processes(tmp_path, saved, resumed):
    """Sharded weights (FSDP) on two, whole ones on one: the same files."""
    run = tmp_path / "run"
    distribute = {1: "ddp", 2: "fsdp"}
    flags = ["--epochs", "40st", "--model-ema-decay", "0.9", "--out", str(run)]
    assert launch(saved, *CLI, *flags, "--distribute", distribute[saved], "--time-limit", "0.01s").returncode != 0
    step = read_json(run / "status.json")["step"]
    assert 0 < step < 40
    changes = ["--change", f"run.distribute={distribute[resumed]}", "--change", "run.time_limit=10min"]
    done = launch(resumed, "-m", "pdvit", "train", "--resume", str(run), *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = tmp_path / "whole"
    flags[-1] = str(whole)
    assert launch(1, *CLI, *flags).returncode == 0
    ours, theirs = (load_file(path / "model.safetensors") for path in (run, whole))
    assert furthest(ours, theirs) <= 1e-4
