"""Stopping, resuming, changing and replaying runs, and the switches of the engine, through `pdvit train`."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pdvit.cli import run as pdvit
from pdvit.engine import recovery
from pdvit.tasks.classification import ClassificationTask
from pdvit.tracking.run_directory import RunDirectory
from tests.files import read_json, read_recipe
from tests.processes import held_elsewhere

SHORT = ["--epochs", "12st", "--batch-size", "16", "--img-size", "16", "--warmup-epochs", "2st"]
SHORT += ["--log-interval", "3st", "--val-interval", "6st"]
STOP, UNLIMITED = ["--time-limit", "0.001s"], "run.time_limit=1h"
# About 12 MB of activations per image.
LARGE = ["--device", "cuda", "--epochs", "2st", "--warmup-epochs", "0st", "--img-size", "64", "--patch-size", "4"]
LARGE += ["--width", "192", "--heads", "3", "--depth", "4"]


def weights(run):
    return load_file(run / "model.safetensors")


@pytest.fixture
def train(tmp_path, tiny):
    """Return a function that trains a tiny model into a new folder and returns that."""
    number = 0

    def start(*flags, status=0):
        nonlocal number
        number += 1
        out = tmp_path / f"run-{number}"
        assert pdvit(["train", *tiny, *SHORT, *flags, "--out", str(out)]) == status
        return out

    return start


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert pdvit(["train", *tiny, *SHORT, *STOP, "--out", str(out)]) == 75
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that its time limit stopped after the first step."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


@pytest.fixture
def bad_images(monkeypatch):
    """From step 5 on, images are not numbers."""
    batches = ClassificationTask.batches

    def with_nan(self, start):
        for number, batch in enumerate(batches(self, start), start):
            if number >= 4:
                batch.images[0, 0, 0, 0] = float("nan")
            yield batch

    monkeypatch.setattr(ClassificationTask, "batches", with_nan)


def resume(run, *changes, status=0):
    assert pdvit(["train", "--resume", str(run), *(flag for c in changes for flag in ("--change", c))]) == status


class TestStopping:
    def test_a_stopped_run_is_resumed_as_the_newest(self, workplace, stopped_once, tiny, capsys):
        shutil.copytree(stopped_once, "runs/older")
        assert pdvit(["train", *tiny, *SHORT, *STOP, "--name", "newer"]) == 75
        assert "pdvit train --resume runs/newer" in capsys.readouterr().out
        status = read_json(workplace / "runs/newer" / "status.json")
        assert (status["status"], status["step"], status["reason"]) == ("stopped", 1, "time limit")
        assert pdvit(["train", "--resume", "auto", "--change", UNLIMITED]) == 0
        assert "resuming after step 1" in capsys.readouterr().out
        assert read_json(workplace / "runs/newer/summary.json")["steps"] == 12
        assert not (workplace / "runs/older/summary.json").exists()

    def test_two_processes_do_not_train_one_run(self, stopped, refusal):
        with held_elsewhere(stopped):
            refusal("train", "--resume", stopped, "--change", UNLIMITED, what="another process is training this run")

    @pytest.mark.slow
    def test_an_older_checkpoint_is_named_if_the_newest_is_damaged(self, refusal, train):
        run = train("--save-every", "1ep", "--epochs", "2ep", "--keep", "2")
        (run / "summary.json").unlink()
        (run / "checkpoints/step-00000150/module.safetensors").write_bytes(b"x")
        refusal("train", "--resume", run, what="damaged", tip="step-00000075")
        (run / "checkpoints/last").write_text("step-00000075")
        resume(run)


class TestChanging:
    def test_a_change_takes_effect_and_is_recorded(self, stopped, stopped_once, tmp_path):
        resume(stopped, UNLIMITED, "optim.epochs=15st", "model.drop_path=0.2", "diversity.cosine=3.0")
        assert read_json(stopped / "summary.json")["steps"] == 15
        assert read_recipe(stopped)["model"]["drop_path"] == 0.2
        changes = {entry["key"]: entry for entry in read_json(stopped / "changes.json")["changes"]}
        assert changes["optim.epochs"] == {"step": 1, "key": "optim.epochs", "from": "12st", "to": "15st"}
        plain = shutil.copytree(stopped_once, tmp_path / "plain")
        resume(plain, UNLIMITED, "optim.epochs=15st", "model.drop_path=0.2")
        assert not torch.equal(weights(stopped)["head.weight"], weights(plain)["head.weight"])

    @pytest.mark.parametrize(
        ("change", "what", "where", "tip"),
        [
            ("data.batch_size=8", "data.batch_size", "--change", "new run"),
            ("run.out=other", "keeps its folder", "--change", "move"),
            ("optim.lrr=1", "optim.lrr", "--change", "'optim.lr'"),
            # an error names the key and --change, not a flag
            ("run.device=cuda:7", "", "run.device of", "--change run.device="),
            ("optim.warmup=12st", "", "optim.warmup of", "shorten"),
        ],
    )
    def test_a_change_that_a_run_can_not_have_is_an_error(self, refusal, stopped, change, what, where, tip):
        before = (stopped / "run.toml").read_bytes()
        refusal("train", "--resume", stopped, "--change", change, what=what, where=where, tip=tip)
        assert (stopped / "run.toml").read_bytes() == before
        assert not (stopped / "changes.json").exists()

    def test_a_finished_run_does_not_change(self, refusal, run_copy):
        assert "finished" in refusal("train", "--resume", run_copy, "--change", "optim.epochs=99st").what
        RunDirectory(run_copy).mark("failed", "as a job that was refused")
        assert read_json(run_copy / "status.json")["status"] == "finished"

    @pytest.mark.slow
    def test_a_run_can_not_become_shorter_than_it_is(self, refusal, train):
        run = train(*STOP, "--save-every", "1st", status=75)
        resume(run, "run.time_limit=0.0001s", status=75)
        changes = ["--change", "optim.epochs=1st", "--change", "optim.warmup=0st"]
        assert "at step 2 already, of 1" in refusal("train", "--resume", run, *changes).what

    @pytest.mark.slow
    def test_other_images_are_an_error_and_moved_ones_are_not(self, refusal, train, image_folder):
        run = train("--data", str(image_folder), *STOP, status=75)
        file = next((image_folder / "train/red").iterdir())
        file.rename(image_folder / "spare.png")
        assert "train has 23 images, and had 24" in refusal("train", "--resume", run).what
        (image_folder / "spare.png").rename(file)
        moved = image_folder.rename(image_folder.with_name("moved"))
        assert "--change data.source=PATH" in refusal("train", "--resume", run).tip
        resume(run, UNLIMITED, f"data.source={moved}")
        assert read_json(run / "summary.json")["steps"] == 12


class TestGuards:
    @pytest.mark.usefixtures("bad_images")
    def test_a_run_whose_loss_is_not_finite_can_be_replayed(self, train, digits_run, refusal, capsys, monkeypatch):
        broken = train(status=1)
        status = read_json(broken / "status.json")
        assert (status["status"], "not a number" in status["reason"]) == ("failed", True)
        assert not (broken / "model.safetensors").exists()
        capsys.readouterr()
        assert pdvit(["train", "--replay", str(broken)]) == 0
        shown = capsys.readouterr().out
        assert "step 9 again" in shown
        assert "model.patch_embed.proj.weight" in shown
        assert pdvit(["train", "--replay", str(broken), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["step"], found["metrics"]["class"]) == (9, None)
        with monkeypatch.context() as patched:  # a signal while the data are read
            patched.setattr("pdvit.workflows.runs.open_source", lambda _: signal.raise_signal(signal.SIGTERM))
            for way in ("--replay", "--resume"):
                assert pdvit(["train", way, str(broken)]) == 75
        assert "no step to replay" in refusal("train", "--replay", digits_run).what
        (broken / "replay/last").write_bytes(b"x")
        assert "damaged" in refusal("train", "--replay", broken).what

    @pytest.mark.slow
    def test_collapse_is_warned_of(self, train, capsys):
        train("--warn-similarity", "0.01")
        shown = capsys.readouterr().out
        assert "collapsing" in shown
        assert "Try a larger --cosine," in shown
        train("--warn-similarity", "0.01", "--diversity", "none")
        assert "Try --cosine 1," in capsys.readouterr().out
        train()
        assert "collapsing" not in capsys.readouterr().out

    @pytest.mark.slow
    def test_out_of_memory_names_the_batch_that_fits_and_resuming_with_it_changes_nothing(
        self, train, monkeypatch, capsys, device
    ):
        plain = ClassificationTask.step

        def step(self, network, batch):
            if len(batch) > 6:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(self, network, batch)

        exact = ["--device", device, "--no-tf32"]
        whole = train("--micro-batch-size", "4", *exact)
        monkeypatch.setattr(ClassificationTask, "step", step)
        run = train(*exact, status=1)
        shown = capsys.readouterr().err
        assert "4 fit" in shown
        assert f"--resume {run} --change data.micro_batch=4" in shown
        resume(run, "data.micro_batch=4")
        torch.testing.assert_close(weights(run), weights(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
class TestMemory:
    @pytest.fixture
    def limit(self):
        """Return a function that leaves this process one GiB of the GPU."""

        def limit_memory():
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)

        yield limit_memory
        torch.cuda.set_per_process_memory_fraction(1.0)

    def test_the_named_batch_fits_a_full_gpu(self, train, limit, capsys):
        limit()
        run = train(*LARGE, "--batch-size", "512", status=1)
        found = re.search(r"no memory for 512 images at a time\b.*\b(\d+) fit; ", capsys.readouterr().err, re.DOTALL)
        assert 1 <= int(found[1]) <= 256
        resume(run, f"data.micro_batch={found[1]}")
        assert read_json(run / "summary.json")["steps"] == 2

    def test_auto_finds_the_batch_that_a_gpu_holds(self, train, limit, monkeypatch):
        """Of a GPU of one GiB; four times as many images do not fit there."""
        monkeypatch.setattr(recovery, "SPARE_MEMORY", 1 - 2**30 / torch.cuda.get_device_properties(0).total_memory)
        run = train(*LARGE, "--batch-size", "auto")
        size = read_recipe(run)["data"]["batch_size"]
        assert size in [2**power for power in range(10)]
        assert read_json(run / "summary.json")["steps"] == 2
        limit()
        train(*LARGE, "--batch-size", str(4 * size), status=1)


class TestSwitches:
    @pytest.mark.slow
    def test_accumulation_and_checkpointing_change_only_rounding(self, train):
        plain = weights(train())
        for flags in (["--micro-batch-size", "5"], ["--grad-checkpointing"]):
            torch.testing.assert_close(weights(train(*flags)), plain, rtol=1e-5, atol=1e-4)

    @pytest.mark.slow
    def test_deterministic_kernels_are_for_one_run(self, train):
        for flags in (["--deterministic"], []):
            train(*flags)
            assert torch.are_deterministic_algorithms_enabled() == bool(flags)

    @pytest.mark.slow
    def test_a_trace_writes_nothing_on_stderr(self, tiny, tmp_path):
        """The profiler's library writes there by itself, not through Python."""
        command = [sys.executable, "-m", "pdvit", "train", *tiny, *SHORT, "--epochs", "4st", "--profile", "2:4"]
        done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
