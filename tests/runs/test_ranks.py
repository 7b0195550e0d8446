"""Several processes on the CPU (gloo) against one: the same recipe, the same total batch.

As a script (`python -m tests.runs.test_ranks OUT SETTINGS STEPS PRECISION`), one process of `steps`.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pdvit.config import build, resolve
from pdvit.data.masks.folders import open_masks
from pdvit.data.opening import open_source
from pdvit.engine.distributed import init_process_group
from pdvit.engine.trainer import Trainer
from pdvit.tasks.classification import ClassificationTask
from pdvit.tasks.segmentation import SegmentationTask
from pdvit.workflows.console import process_group
from tests.files import assert_same, newest_step, read_json
from tests.processes import TORCHRUN, wait

STEPS, PATIENCE, ROOT = 20, 300, Path(__file__).parents[2]
CPU = torch.device("cpu")
MODEL = {"depth": 2, "width": 16, "heads": 1, "patch_size": 8}
SETTINGS = {
    "model": MODEL,
    "data": {"batch_size": 16, "img_size": 16},
    "augment": {"shift": 2},
    "optim": {"lr": 0.05, "warmup": "2st", "ema_decay": 0.9, "clip_grad": 1.0},
    "run": {"device": "cpu"},
}


class Wide(ClassificationTask):
    """The task in float64, so that what is left are differences of order."""

    def step(self, network, batch):
        return super().step(network, replace(batch, images=batch.images.double()))


@process_group()
def train_steps(out, settings, steps, wide):
    """Train some steps of a real task in this process, and write its weights and numbers to a folder."""
    torch.use_deterministic_algorithms(True)
    config, ranks = resolve(build(("test", settings))), init_process_group()
    segments = config.segment.head is not None
    source = open_masks(config.data, config.segment) if segments else open_source(config.data)
    task_type = SegmentationTask if segments else Wide if wide else ClassificationTask
    task = task_type(config, source, CPU, ranks)
    for module in task.module.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0  # a head's dropout is drawn by each process for itself
    if wide:
        task.module.double()
    trainer = Trainer(task, config, CPU, ranks)
    state = trainer.state
    for step, batch in zip(range(steps), task.batches(0), strict=False):
        trainer.lr_scheduler.step_update(step)
        state.metrics.add(*trainer.updater(batch, step + 1))
        state.progress.step += 1
    means, _, _ = state.metrics.read(ranks)
    records = {} if wide else task.evaluate(trainer.evaluated)[0]
    snapshot = state.state_dict()
    if ranks.main:
        out.mkdir(parents=True)
        for name, tensors in snapshot.tensors.items():
            save_file(tensors, out / f"{name}.safetensors")
        (out / "numbers.json").write_text(json.dumps({"train": means} | records))
    torch.use_deterministic_algorithms(False)


def steps(out, processes, settings, precision="short", count=STEPS):
    """Train some steps in so many processes, this one among them, and return tensors and numbers."""
    here = not settings["run"].get("compile")  # not beside pytest, for which the compiler's warnings are errors
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", __name__, str(out), json.dumps(settings), str(count), precision]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", port), ("WORLD_SIZE", processes)):
            patch.setenv(name, str(value))
        others = []
        for rank in range(here, processes):
            patch.setenv("RANK", str(rank))
            others.append(subprocess.Popen(command, cwd=ROOT))
        patch.setenv("RANK", "0")
        if here:
            train_steps(out, settings, count, precision == "wide")
    assert all(other.wait(PATIENCE) == 0 for other in others)
    files = {file.stem: load_file(file) for file in out.glob("*.safetensors")}
    tensors = {f"{file}.{name}": value for file, values in files.items() for name, value in values.items()}
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
GRAM = {  # the anchor is the model as it begins
    "model": MODEL | {"name": "vit_tiny_patch16_224", "init": "start", "drop_path": 0.0},
    "diversity": {"preset": "paper", "gram": 9.0},
}
MICRO = {"data": {"batch_size": 16, "img_size": 16, "micro_batch": 3}}
NO_EMA = {"lr": 0.001, "ema_decay": None}  # then the trained network is evaluated just before its state is saved


# The bounds of docs/runs.md: SGD in float32 within 1e-6, AdamW in float64 within 1e-10.
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
                ("ddp", {"opt": "sgd"}, "short", 1e-6, GRAM | MICRO, STEPS),
                ("fsdp", {"opt": "sgd"}, "short", 1e-6, GRAM, STEPS),
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


def launch(processes, *arguments, fails=False):
    """Run a module or script in so many processes, which all end well, or fail."""
    start = [*TORCHRUN, str(processes)] if processes > 1 else [sys.executable]
    command = [*start, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_two_processes_measure_a_segmentation_as_one_does(tmp_path, mask_folder):
    """Every labelled pixel once, though three images do not divide by two; what does not decode is left out."""
    run, once = tmp_path / "run", tmp_path / "once"
    segment = [*CLI[:2], "segment", "--data", mask_folder, *CLI[3:11], "--head-width", "8", "--crop", "32"]
    segment += ["--batch-size", "4", "--eval-mode", "whole", "--device", "cpu", "--workers", "0"]
    launch(2, *segment, "--epochs", "6st", "--out", run)
    labelled = sum(int((np.array(Image.open(file)) != 7).sum()) for file in (mask_folder / "masks/val").iterdir())
    assert sum(int(line.split(",")[1]) for line in (run / "iou.csv").read_text().splitlines()[1:]) == labelled
    evaluate, ended = ["-m", "pdvit", "eval", run, "--device", "cpu", "--out", once], read_json(run / "summary.json")
    for processes in (1, 2):
        launch(processes, *evaluate)
        found = read_json(once / "eval.json")
        assert (found["processes"], found["images"]) == (processes, 3)
        for name in ("miou", "accuracy", "accuracy_mean"):
            assert found[name] == ended[name]
        assert found["loss"] == pytest.approx(ended["loss"], rel=1e-12)
        for file in ("iou.csv", *(path.relative_to(run) for path in (run / "predictions").iterdir())):
            assert (once / file).read_bytes() == (run / file).read_bytes()
    (mask_folder / "images/val/2.png").write_bytes(b"torn")
    left = []
    for processes in (1, 2):
        launch(processes, *evaluate, "--on-bad-image", "skip")
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
    done = launch(2, *CLI, *flags, "--out", tmp_path / "run", fails=True)
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
    done = launch(2, script, *CLI[2:], "--out", tmp_path / "run", fails=True)
    assert "UserError: there is no key 'optim.lrr'" in done.stderr.partition("Root Cause")[2]


@pytest.mark.slow
@pytest.mark.parametrize("distribute", ["ddp", "fsdp"])
def test_a_signal_ends_an_evaluation_of_several_processes_within_a_batch(tmp_path, distribute):
    run, folder = tmp_path / "run", tmp_path / "images"
    for part, count in (("train", 16), ("val", 3000)):
        for number in range(count):
            (folder / part / str(number % 2)).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (300, 300)).save(folder / part / str(number % 2) / f"{number}.jpg")
    command = [*TORCHRUN, "2", *CLI, "--epochs", "100st", "--val-interval", "5st", "--resident", "off"]
    command += ["--workers", "0", "--data", str(folder), "--distribute", distribute, "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait(lambda: newest_step(run) >= 5 or process.poll() is not None, run)
        process.send_signal(signal.SIGTERM)
        sent, errors = time.time(), process.communicate(timeout=PATIENCE)[1]
    print(f"{distribute}: saved {(run / 'status.json').stat().st_mtime - sent:.1f} s after the signal")
    status = read_json(run / "status.json")
    assert (status["status"], status["step"]) == ("stopped", 5), errors[-3000:]
    assert "SIGTERM: stopping ..." in errors
    assert read_json(run / "checkpoints/step-00000005/state.json")["progress"]["evaluation_owed"]


FAILING = """
import os, signal, sys
from pdvit.cli import run
from pdvit.tasks.classification import ClassificationTask
plain, steps = ClassificationTask.step, 0
def step(self, network, batch):
    global steps
    steps += 1
    if steps == 18 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, network, batch)
ClassificationTask.step = step
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_can_be_resumed(tmp_path):
    script, whole, run = tmp_path / "failing.py", tmp_path / "whole", tmp_path / "run"
    script.write_text(FAILING)
    launch(2, script, *CLI[2:], "--epochs", "40st", "--out", run, fails=True)
    assert read_json(run / "status.json")["status"] in ("failed", "running")
    assert (run / "checkpoints/last").read_text() == "step-00000015"
    launch(2, "-m", "pdvit", "train", "--resume", run)
    launch(2, *CLI, "--epochs", "40st", "--out", whole)
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "resumed"), [(2, 1), (1, 2)])
def test_a_checkpoint_loads_on_another_number_of_processes(tmp_path, saved, resumed):
    """Sharded weights (FSDP) on two, whole ones on one: the same files."""
    run, whole, distribute = tmp_path / "run", tmp_path / "whole", {1: "ddp", 2: "fsdp"}
    flags = [*CLI, "--epochs", "40st", "--model-ema-decay", "0.9", "--out"]
    launch(saved, *flags, run, "--distribute", distribute[saved], "--time-limit", "0.01s", fails=True)
    assert 0 < read_json(run / "status.json")["step"] < 40
    changes = ["--change", f"run.distribute={distribute[resumed]}", "--change", "run.time_limit=10min"]
    launch(resumed, "-m", "pdvit", "train", "--resume", run, *changes)
    launch(1, *flags, whole)
    ours, theirs = (load_file(path / "model.safetensors") for path in (run, whole))
    assert furthest(ours, theirs) <= 1e-4


if __name__ == "__main__":
    train_steps(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "wide")
