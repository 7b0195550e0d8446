"""What the engine can do, through `pdvit train`: stop, resume, change, replay, keep, precision, parts, average."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pdvit.cli import run as pdvit
from pdvit.data.preprocessing import Preprocessing
from pdvit.engine import recovery
from pdvit.tracking import RunDirectory

SHORT = ["--epochs", "12st", "--batch-size", "16", "--img-size", "16", "--warmup-epochs", "2st"]
SHORT += ["--log-interval", "3st", "--val-interval", "6st"]
# A step keeps some 12 MB of each image.
LARGE = ["--device", "cuda", "--epochs", "2st", "--warmup-epochs", "0st", "--img-size", "64", "--patch-size", "4"]
LARGE += ["--width", "192", "--heads", "3", "--depth", "4"]


def read(run, name):
    return json.loads((run / name).read_text())


def recipe(run):
    return tomllib.loads((run / "run.toml").read_text())


def weights(run):
    return load_file(run / "model.safetensors")


@pytest.fixture
def train(tmp_path, tiny):
    """Return a function that trains a tiny model into a folder of its own and returns that."""
    number = 0

    def start(*flags, status=0):
        nonlocal number
        number += 1
        out = tmp_path / f"run-{number}"
        assert pdvit(["train", *tiny, *SHORT, *flags, "--out", str(out)]) == status
        return out

    return start


@pytest.fixture
def stopped(train):
    """A run that its time limit stopped after the first step."""
    return train("--time-limit", "0.001s", status=75)


def make_square(folder):
    """Cut the images of a folder to the input size of a short run."""
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            image.crop((8, 8, 24, 24)).save(file)
    return folder


def go_on(run, *changes, status=0):
    assert pdvit(["train", "--resume", str(run), *(flag for c in changes for flag in ("--change", c))]) == status


@pytest.fixture
def gigabyte():
    """A context in which torch gives this process one GiB of the GPU; `share` is that part of all of it."""

    @contextmanager
    def limited():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limited.share)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    limited.share = 2**30 / torch.cuda.get_device_properties(0).total_memory
    return limited


UNLIMITED = "run.time_limit=1h"


class TestStopping:
    def test_a_time_limit_stops_with_75_and_says_how_to_go_on(self, train, capsys):
        run = train("--time-limit", "0.001s", status=75)
        assert f"pdvit train --resume {run}" in capsys.readouterr().out
        assert read(run, "status.json") | {"best": 0} == {
            "status": "stopped",
            "step": 1,
            "reason": "time limit",
            "best": 0,
        }

    def test_a_limit_that_is_no_time_is_refused(self, refusal, tiny):
        assert "3ep" in refusal("train", *tiny, "--time-limit", "3ep").what

    def test_auto_resumes_the_newest(self, workplace, tiny, capsys):
        flags = ["train", *tiny, *SHORT, "--time-limit", "0.001s"]
        for name in ("older", "newer"):
            assert pdvit([*flags, "--name", name]) == 75
        assert pdvit(["train", "--resume", "auto", "--change", UNLIMITED]) == 0
        assert (workplace / "runs/newer/summary.json").exists()
        assert not (workplace / "runs/older/summary.json").exists()

    def test_auto_without_a_run_is_refused(self, refusal, workplace):
        assert "no run" in refusal("train", "--resume", "auto").what

    def test_a_finished_run_says_so(self, train, capsys):
        run = train()
        before = (run / "metrics.jsonl").read_bytes()
        go_on(run)
        assert "is finished" in capsys.readouterr().out
        assert (run / "metrics.jsonl").read_bytes() == before

    def test_a_run_without_a_state_starts_again(self, stopped, train, records):
        shutil.rmtree(stopped / "checkpoints")
        go_on(stopped, UNLIMITED)
        assert records(stopped) == records(train())


class TestChanging:
    def test_a_change_takes_effect_and_is_recorded(self, stopped):
        go_on(stopped, UNLIMITED, "optim.epochs=15st", "model.drop_path=0.2")
        assert read(stopped, "summary.json")["steps"] == 15
        assert recipe(stopped)["model"]["drop_path"] == 0.2
        changes = {entry["key"]: entry for entry in read(stopped, "changes.json")["changes"]}
        assert changes["optim.epochs"] == {"step": 1, "key": "optim.epochs", "from": "12st", "to": "15st"}

    def test_a_change_equals_a_run_that_had_it_from_there(self, stopped, train):
        """A loss weight changes nothing before the second step but the first: so the runs differ from an unchanged."""
        plain = train("--time-limit", "0.001s", status=75)
        go_on(plain, UNLIMITED)
        go_on(stopped, UNLIMITED, "diversity.cosine=3.0")
        ours, theirs = (weights(run) for run in (stopped, plain))
        assert any(not torch.equal(ours[name], theirs[name]) for name in ours)

    @pytest.mark.parametrize(
        "change", ["data.batch_size=8", "run.seed=3", "model.depth=3", "diversity.mixing=0.0", "optim.opt=nonsense"]
    )
    def test_what_would_be_another_run_is_refused(self, refusal, stopped, change):
        before = (stopped / "run.toml").read_bytes()
        refused = refusal("train", "--resume", stopped, "--change", change)
        assert change.split("=")[0] in refused.what
        assert (stopped / "run.toml").read_bytes() == before
        assert not (stopped / "changes.json").exists()

    def test_an_edited_recipe_is_refused_by_its_keys(self, refusal, stopped):
        text = (stopped / "run.toml").read_text()
        (stopped / "run.toml").write_text(text.replace("weight_decay = 0.05", "weight_decay = 0.3"))
        refused = refusal("train", "--resume", stopped)
        assert "optim.weight_decay was 0.05, is 0.3" in refused.what
        assert "--change" in refused.tip

    @pytest.mark.parametrize("change", ["optim.lr=fast", "optim.lr=-1", "optim.lrr=1", "lr=1", "run.time_limit=3ep"])
    def test_a_bad_change_is_named_as_it_was_given(self, refusal, stopped, change):
        refused = refusal("train", "--resume", stopped, "--change", change)
        assert "--change" in refused.where
        assert "--set" not in refused.where + refused.tip

    @pytest.mark.parametrize(
        ("change", "key", "tip"),
        [
            ("run.device=cuda:7", "run.device", "try --change run.device=cpu"),
            ("optim.warmup=12st", "optim.warmup", "shorten"),
            ("augment.shift=16", "augment.shift", "less than 16"),
        ],
    )
    def test_an_error_of_a_resumed_run_names_keys_and_no_flags(self, refusal, stopped, change, key, tip):
        refused = refusal("train", "--resume", stopped, "--change", change)
        assert tip in refused.tip
        assert refused.where == f"{key} of {stopped}"

    def test_an_unknown_key_names_the_closest(self, refusal, stopped):
        assert "lr" in refusal("train", "--resume", stopped, "--change", "optim.lrr=1").tip

    def test_an_emptied_recipe_is_refused(self, refusal, stopped):
        shutil.rmtree(stopped / "checkpoints")  # nothing else could tell
        (stopped / "run.toml").write_text("")
        refused = refusal("train", "--resume", stopped)
        assert "run.toml is empty" in refused.what
        assert "state.json" in refused.tip

    @pytest.mark.slow
    def test_a_run_can_not_become_shorter_than_it_is(self, refusal, tiny, tmp_path, train):
        run = train("--time-limit", "0.001s", "--save-every", "1st", status=75)
        go_on(run, "run.time_limit=0.0001s", status=75)
        assert (
            "2 steps are done already, of 1"
            in refusal("train", "--resume", run, "--change", "optim.epochs=1st", "--change", "optim.warmup=0st").what
        )

    def test_a_finished_run_does_not_change(self, refusal, train):
        assert "finished" in refusal("train", "--resume", train(), "--change", "optim.epochs=99st").what

    @pytest.mark.parametrize("key", ["run.out", "run.name"])
    def test_a_run_stays_where_it_is(self, refusal, stopped, key):
        assert "keeps its folder" in refusal("train", "--resume", stopped, "--change", f"{key}=other").what

    def test_only_a_resumed_run_is_changed(self, refusal, tiny):
        assert "--resume" in refusal("train", *tiny, "--change", "optim.lr=1").tip

    def test_flags_are_refused_with_resume(self, refusal, stopped):
        assert "--change" in refusal("train", "--resume", stopped, "--lr", "1").tip


class TestSafety:
    @pytest.mark.slow
    def test_two_processes_do_not_train_one_run(self, stopped):
        command = [sys.executable, "-m", "pdvit", "train", "--resume", str(stopped), "--change", UNLIMITED]
        with RunDirectory.open(stopped).locked():
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert "another process is training this run" in done.stderr

    def test_an_empty_folder_becomes_the_run(self, tmp_path, tiny):
        (tmp_path / "made").mkdir()
        assert pdvit(["train", *tiny, *SHORT, "--out", str(tmp_path / "made")]) == 0

    @pytest.mark.slow
    def test_an_older_checkpoint_is_named_where_the_newest_is_damaged(self, refusal, train):
        run = train("--save-every", "1ep", "--epochs", "2ep", "--keep", "2")
        (run / "summary.json").unlink()
        (run / "checkpoints/step-00000150/module.safetensors").write_bytes(b"x")
        refused = refusal("train", "--resume", run)
        assert "damaged" in refused.what
        assert "step-00000075" in refused.tip
        (run / "checkpoints/last").write_text("step-00000075")
        go_on(run)

    def test_what_was_learnt_before_a_bad_image_is_saved(self, tmp_path, tiny, image_folder, capsys):
        """The workers have read ahead, so the step it fails at is not the one after the last."""
        bad = image_folder / "train/blue/0.png"
        out = tmp_path / "run"
        command = ["train", *tiny, *SHORT, "--data", str(image_folder), "--workers", "0", "--out", str(out)]
        from pdvit.tasks.classification import ClassificationTask

        plain, steps = ClassificationTask.step, 0

        def step(self, network, batch):
            nonlocal steps
            steps += 1
            if steps == 5:
                bad.write_bytes(b"no image")
            return plain(self, network, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClassificationTask, "step", step)
            assert pdvit([*command]) == 2
        saved = int((out / "checkpoints/last").read_text().removeprefix("step-"))
        assert saved == read(out, "status.json")["step"] >= 5

    @pytest.mark.slow
    def test_records_that_are_lost_are_said(self, train, capsys):
        run = train("--time-limit", "0.001s", "--log-interval", "1st", status=75)
        (run / "metrics.jsonl").write_text("")
        capsys.readouterr()
        go_on(run, UNLIMITED)
        assert "1 records were written up to step 1, and 0 are left" in capsys.readouterr().out

    def test_what_takes_long_is_said_first(self, image_folder, tmp_path):
        """The first line is there before torch is imported, on no terminal."""
        code = "import sys; sys.modules['torch'] = None\nfrom pdvit.cli import run; run(sys.argv[1:])"
        command = [sys.executable, "-c", code, "train", "--data", str(image_folder), "--out", str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.stdout == f"opening {image_folder} ...\n"

    @pytest.mark.slow
    def test_where_a_resumed_run_goes_on_is_said(self, stopped, capsys):
        capsys.readouterr()
        go_on(stopped, UNLIMITED)
        assert "resuming after step 1" in capsys.readouterr().out


class TestData:
    @pytest.mark.slow
    def test_fewer_files_than_before_are_refused_with_the_counts(self, refusal, train, image_folder):
        run = train("--data", str(image_folder), "--time-limit", "0.001s", status=75)
        next((image_folder / "train/red").iterdir()).unlink()
        assert "train has 23 images, and had 24" in refusal("train", "--resume", run).what

    @pytest.mark.slow
    def test_other_files_are_refused(self, refusal, train, image_folder):
        run = train("--data", str(image_folder), "--time-limit", "0.001s", status=75)
        file = next((image_folder / "train/red").iterdir())
        file.rename(file.with_name("other.png"))
        assert "train has changed" in refusal("train", "--resume", run).what

    @pytest.mark.slow
    def test_data_that_are_gone_name_how_to_go_on(self, refusal, train, image_folder):
        run = train("--data", str(image_folder), "--time-limit", "0.001s", status=75)
        image_folder.rename(image_folder.with_name("moved"))
        for more in ([], ["--change", f"data.source={image_folder}-2"]):
            refused = refusal("train", "--resume", run, *more)
            assert f"pdvit train --resume {run} --change data.source=PATH" in refused.tip

    @pytest.mark.slow
    def test_moved_data_are_found_again(self, train, image_folder):
        run = train("--data", str(image_folder), "--time-limit", "0.001s", status=75)
        moved = image_folder.rename(image_folder.with_name("moved"))
        go_on(run, UNLIMITED, f"data.source={moved}")
        assert read(run, "summary.json")["steps"] == 12

    def test_images_on_the_device_learn_what_those_of_workers_do(self, train, image_folder, device, records):
        """To the bit, where the crop has nothing to round: batches, metrics and weights."""
        flags = ["--data", str(make_square(image_folder)), "--scale", "1", "1", "--ratio", "1", "1", "--reprob", "0.5"]
        flags += ["--aa", "rand-m9", "--epochs", "6st", "--workers", "0", "--device", device]
        flags += ["--deterministic"] if device == "cuda" else []
        kept, decoded = (train(*flags, "--resident", where) for where in ("on", "off"))
        assert records(kept) == records(decoded)
        ours, theirs = weights(kept), weights(decoded)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    @pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
    def test_workers_change_nothing(self, train, image_folder, workers):
        flags = ["--data", str(image_folder), "--drop-path", "0.3", "--epochs", "6st"]
        alone, several = (train(*flags, "--workers", str(count)) for count in (0, workers))
        ours, theirs = weights(several), weights(alone)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestGuards:
    @pytest.fixture
    def broken(self, monkeypatch, train):
        """A run whose images are not numbers from step 5 on."""
        from pdvit.tasks.classification import ClassificationTask

        steps = ClassificationTask.batches

        def batches(self, start):
            for number, batch in enumerate(steps(self, start), start):
                if number >= 4:
                    batch.images[0, 0, 0, 0] = float("nan")
                yield batch

        monkeypatch.setattr(ClassificationTask, "batches", batches)
        return train(status=1)

    def test_a_run_whose_loss_breaks_down_can_be_replayed(self, broken, capsys):
        assert "not a number" in read(broken, "status.json")["reason"]
        capsys.readouterr()
        assert pdvit(["train", "--replay", str(broken)]) == 0
        shown = capsys.readouterr().out
        assert "step 9 again" in shown
        assert "not finite" in shown
        assert "model.patch_embed.proj.weight" in shown
        assert pdvit(["train", "--replay", str(broken), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["step"] == 9
        assert found["metrics"]["class"] is None

    @pytest.mark.slow
    def test_nothing_to_replay_is_refused(self, refusal, train):
        assert "no step to replay" in refusal("train", "--replay", train()).what

    def test_a_damaged_bundle_is_refused(self, refusal, broken):
        (broken / "replay/share-0.safetensors").write_bytes(b"x")
        assert "damaged" in refusal("train", "--replay", broken).what

    @pytest.mark.slow
    def test_collapse_is_warned_of(self, train, capsys):
        train("--warn-similarity", "0.01")
        shown = capsys.readouterr().out
        assert "collapsing" in shown
        assert "--cosine" in shown
        train()
        assert "collapsing" not in capsys.readouterr().out

    @pytest.mark.slow
    def test_out_of_memory_says_what_fits_and_going_on_so_gives_the_same(self, train, monkeypatch, capsys, device):
        from pdvit.tasks.classification import ClassificationTask

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
        go_on(run, "data.micro_batch=4")
        ours, theirs = weights(run), weights(whole)
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)

    @pytest.mark.gpu
    def test_what_a_full_gpu_says_fits_does_fit(self, train, gigabyte, capsys):
        with gigabyte():
            run = train(*LARGE, "--batch-size", "512", status=1)
            said = re.search(r"no memory for 512 images at a time\b.*\b(\d+) fit; ", capsys.readouterr().err, re.DOTALL)
            assert 1 <= int(said[1]) <= 256
            go_on(run, f"data.micro_batch={said[1]}")
        assert read(run, "summary.json")["steps"] == 2

    @pytest.mark.gpu
    def test_auto_finds_the_batch_that_a_gpu_holds(self, train, gigabyte, monkeypatch):
        """Of a GPU of one GiB; four times as many images do not fit there."""
        monkeypatch.setattr(recovery, "SPARE_MEMORY", 1 - gigabyte.share)
        run = train(*LARGE, "--batch-size", "auto")
        size = recipe(run)["data"]["batch_size"]
        assert size in [2**power for power in range(10)]
        assert read(run, "summary.json")["steps"] == 2
        with gigabyte():
            train(*LARGE, "--batch-size", str(4 * size), status=1)

    def test_a_batch_size_is_not_sought_on_a_cpu(self, refusal, tiny):
        assert "needs a GPU" in refusal("train", *tiny, "--batch-size", "auto").what


class TestSwitches:
    @pytest.mark.slow
    def test_parts_and_recomputing_change_nothing_but_rounding(self, train):
        plain = weights(train())
        for flags in (["--micro-batch-size", "5"], ["--grad-checkpointing"]):
            other = weights(train(*flags))
            assert all(torch.allclose(plain[name], other[name], atol=1e-4) for name in plain), flags

    def test_an_average_is_exported_and_said(self, train):
        raw, average = train(), train("--model-ema-decay", "0.9")
        assert read(raw, "summary.json")["weights"] == "raw"
        assert read(average, "summary.json")["weights"] == "ema"
        assert read(average, "config.json")["pdvit"]["weights"] == "ema"
        ours, theirs = weights(average), weights(raw)
        assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
        last = (average / "checkpoints/last").read_text()
        kept = load_file(average / "checkpoints" / last / "ema.safetensors")
        assert all(torch.equal(ours[name], kept[f"model.{name}"]) for name in ours)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_short_precisions_train_nearly_alike(self, train, precision, records, device):
        """Near float32 on a CPU: a number of 8 bits is off by up to 0.4%, and float16 first skips a step or two."""
        runs = train(), train("--device", device, "--precision", precision)
        expected, found = (read(run, "summary.json") for run in runs)
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
        for name in ("similarity_first", "similarity_last"):
            assert found[name] == pytest.approx(expected[name], abs=0.02)
        for ours, theirs in zip(*(records(run, "train") for run in reversed(runs)), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)

    @pytest.mark.slow
    def test_deterministic_kernels_are_asked_for_and_left_again(self, train):
        train("--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        train()
        assert not torch.are_deterministic_algorithms_enabled()

    @pytest.mark.slow
    def test_layer_decay_slows_the_lower_blocks(self, train):
        """With a factor near 0 only the uppermost layers move."""
        runs = [train("--layer-decay", "1e-6"), train("--layer-decay", "1e-6", "--epochs", "24st")]
        short, long = (weights(run) for run in runs)
        assert torch.allclose(short["blocks.0.attn.qkv.weight"], long["blocks.0.attn.qkv.weight"], atol=1e-6)
        assert not torch.allclose(short["head.weight"], long["head.weight"], atol=1e-4)

    @pytest.mark.parametrize(
        "schedule", ["poly", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wsd", "tanh", "constant"))]
    )
    def test_schedules_of_timm(self, train, schedule, records):
        run = train("--sched", schedule, "--log-interval", "1st", "--epochs", "40st", "--warmup-epochs", "4st")
        rates = [record["lr"] for record in records(run, "train")]
        assert rates[:4] == sorted(rates[:4])
        assert max(rates) == pytest.approx(1e-3)
        assert (rates[-1] < 2e-4) == (schedule != "constant")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
    def test_a_compiled_step_equals_an_eager_one(self, train, device, records):
        """By SGD: AdamW divides a gradient by its own size, so where that is rounding alone, it makes steps of it.

        Without TF32, which rounds what differs in the last bit to factors that differ by a thousandth.
        """
        flags = ["--epochs", "6st", "--opt", "sgd", "--lr", "0.1", "--device", device, "--no-tf32"]
        plain, compiled = train(*flags), train(*flags, "--compile")
        ours, theirs = weights(compiled), weights(plain)
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
        for one, other in zip(records(compiled, "train"), records(plain, "train"), strict=True):
            for name in ("loss", "class", "cosine", "contrastive", "mixing", "grad_norm"):
                assert one[name] == pytest.approx(other[name], rel=1e-4), name

    def test_a_trace_is_written(self, train):
        (file,) = (train("--profile", "3:5") / "profile").iterdir()
        assert json.loads(file.read_text())["traceEvents"]

    @pytest.mark.slow
    def test_a_trace_says_nothing_on_stderr(self, tiny, tmp_path):
        """The profiler's library writes there by itself, not through Python."""
        command = [sys.executable, "-m", "pdvit", "train", *tiny, *SHORT, "--epochs", "4st", "--profile", "2:4"]
        done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("shift", [16, 99])
    def test_a_shift_that_leaves_nothing_of_an_image_is_refused(self, refusal, tiny, shift):
        refused = refusal("train", *tiny, "--img-size", 16, "--shift", shift)
        assert f"{shift} pixels leaves nothing of images of 16x16" in refused.what

    def test_layers_without_a_p_are_named(self, train, capsys, monkeypatch):
        import pdvit.tasks.probe as probe

        def similarity(tokens):
            return torch.tensor([float("nan")]) if tokens.shape[-1] == 16 else torch.tensor([0.5])

        monkeypatch.setattr(probe, "patch_similarity", similarity)
        train()
        assert "tokens of embed, block 1, block 2, norm are not finite" in capsys.readouterr().out

    @pytest.mark.parametrize("span", ["5", "5:5", "a:b", "0:3", "5:"])
    def test_a_span_that_is_none_is_refused(self, refusal, tiny, span):
        assert "FROM:TO" in refusal("train", *tiny, "--profile", span).what

    def test_an_unknown_tracker_is_refused_before_the_start(self, refusal, workplace, tiny):
        assert refusal("train", *tiny, "--track", "tensorbord").tip == "did you mean 'tensorboard'?"
        assert not (workplace / "runs").exists()


class TestFormats:
    def test_a_half_copied_checkpoint_is_refused_and_nothing_lost(self, refusal, stopped):
        folder = stopped / "checkpoints" / (stopped / "checkpoints/last").read_text()
        file = folder / "module.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        before = (stopped / "metrics.jsonl").read_bytes() if (stopped / "metrics.jsonl").exists() else b""
        assert "damaged" in refusal("train", "--resume", stopped).what
        assert ((stopped / "metrics.jsonl").read_bytes() if before else b"") == before

    def test_a_device_that_is_gone_is_refused(self, refusal, stopped):
        refused = refusal("train", "--resume", stopped, "--change", "run.device=cuda:7")
        assert "--change run.device=cpu" in refused.tip


def test_normalising_is_that_of_torchvision():
    from torchvision.transforms.v2 import functional as V

    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    how = Preprocessing(8, 1.0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = V.normalize(images.float() / 255, how.mean, how.std)
    torch.testing.assert_close(how.normalise(images), expected, rtol=1e-5, atol=1e-5)
