"""`pdvit train`: what a run learns, writes and prints, and which input is an error."""

import json
import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pdvit.cli import run as pdvit
from pdvit.config.schema import PRESETS, TERMS
from tests.files import read_json, read_recipe, read_records, weights

SHORT = ["--epochs", "3st", "--batch-size", "16", "--img-size", "24", "--log-interval", "1st", "--mixup-prob", "1"]
IMAGES = ["--epochs", "2", "--batch-size", "6", "--workers", "0", "--img-size", "16", "--log-interval", "1st"]


@pytest.fixture
def train(workplace, tiny):
    """Return a function that trains three steps and returns the run directory."""

    def start(*flags: object, out: str = "run", base: list[str] | None = None) -> Path:
        arguments = [*(tiny if base is None else base), *SHORT, *map(str, flags), "--out", out]
        assert pdvit(["train", *arguments]) == 0
        return workplace / out

    return start


@pytest.fixture(scope="module")
def preset_run(tmp_path_factory, tiny):
    """Return a function that trains three steps with a preset, once for all tests."""

    @cache
    def start(preset: str) -> Path:
        out = tmp_path_factory.mktemp("preset") / preset
        assert pdvit(["train", *tiny, *SHORT, "--diversity", preset, "--out", str(out)]) == 0
        return out

    return start


def last_state(run: Path) -> dict:
    newest = (run / "checkpoints" / "last").read_text().strip()
    return load_file(run / "checkpoints" / newest / "module.safetensors")


class TestFiles:
    def test_a_run_writes_its_files(self, digits_run):
        names = {"model.safetensors", "config.json", "run.toml", "environment.json", "status.json", "summary.json"}
        assert {path.name for path in digits_run.iterdir()} == names | {"metrics.jsonl", "checkpoints"}
        newest = (digits_run / "checkpoints" / "last").read_text().strip()
        assert {path.name for path in (digits_run / "checkpoints").iterdir()} == {".lock", "last", newest}

    def test_summary_and_status_have_the_closing_numbers(self, digits_run):
        summary, status = read_json(digits_run / "summary.json"), read_json(digits_run / "status.json")
        assert set(summary) == {"task", "split", "weights", "images_per_second", "accuracy", "loss", "epochs", "steps",
            "similarity_first", "similarity_last", "seconds", "steps_skipped", "seconds_by_phase"}  # fmt: skip
        assert (summary["task"], summary["split"]) == ("classification", "test")
        assert (summary["epochs"], summary["steps"]) == (2, 2 * (1200 // 128))
        assert all(0 <= summary[name] <= 1 for name in ("accuracy", "similarity_first", "similarity_last"))
        best = max(record["accuracy"] for record in read_records(digits_run, "eval"))
        assert (status["status"], status["step"], status["best"]["accuracy"]) == ("finished", 18, best)

    def test_a_terminal_of_eighty_columns_breaks_no_word(self, workplace, tiny, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        command = ["train", *tiny, *SHORT, "--depth", "12", "--name", "a-run-with-a-name"]
        words = list[set[str]]()
        for terminal in ("0", "1"):
            monkeypatch.setenv("TTY_COMPATIBLE", terminal)
            assert pdvit(command) == 0
            shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().out.replace("-2", ""))
            lines = [line for line in re.split(r"[\r\n]+", shown) if "━" not in line]
            words.append({*" ".join(lines).split()})
            assert max(map(len, lines)) <= 80 or terminal == "0"
        assert {word for word in words[1] - words[0] if not re.sub("[.,]", "", word).isdecimal()} == set()

    def test_every_evaluation_measures_every_layer_and_times_stand_apart(self, digits_run):
        found = read_records(digits_run, "similarity")
        assert [r["step"] for r in found] == [r["step"] for r in read_records(digits_run, "eval")] == [9, 18]
        for record in found:
            assert record["layers"] == ["embed", "block 1", "block 2", "norm"]
            assert all(0 < value <= 1 for value in record["similarity"])
        for line in (digits_run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert not {"seconds", "images_per_second"} & set(record)
            assert record["kind"] != "train" or {"seconds", "images_per_second"} <= set(record["time"])

    def test_json_prints_only_the_summary_and_unused_settings_are_notes(self, train, capsys):
        run = train("--json", "--diversity", "none", "--variant", "v1", "--val-split", "nonsense", "--crop-pct", "0.5")
        shown = capsys.readouterr()
        assert json.loads(shown.out) == read_json(run / "summary.json")
        assert "note: diversity.variant = v1 has no effect" in shown.err
        assert "note: data.val_split = nonsense has no effect" in shown.err
        assert "note: data.crop_pct = 0.5 has no effect: the images are in memory" in shown.err


class TestTerms:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_preset_trains_its_terms_with_its_weights(self, preset_run, preset):
        run = preset_run(preset)
        expected = {name: PRESETS[preset][name] for name in TERMS}
        for record in read_records(run, "train"):
            assert {name for name in TERMS if name in record} == {name for name in TERMS if expected[name]}
            if preset == "diverse-vit":  # 9 patches
                loss = (record["class"] + 9 * record["mixing"]) / 10 + 0.5 * (record["cosine"] + record["contrastive"])
            else:
                loss = record["class"] + sum(expected[name] * record[name] for name in TERMS if expected[name])
            assert record["loss"] == pytest.approx(loss, rel=1e-5)
        assert {name: read_recipe(run)["diversity"][name] for name in TERMS} == expected
        has_head = expected["mixing"] > 0 and PRESETS[preset]["patch_head"] == "own"
        assert ("patch_head.weight" in last_state(run)) == has_head

    def test_the_control_sees_the_images_of_the_mixing_term(self, preset_run):
        # Before the first update, the class losses differ only if the images do.
        first = [read_records(preset_run(name), "train")[0] for name in ("none", "cutmix", "paper")]
        none, cutmix, paper = (record["class"] for record in first)
        assert math.isclose(cutmix, paper, rel_tol=1e-6)
        assert not math.isclose(none, cutmix, rel_tol=1e-6)

    def test_patches_learn_which_image_they_are_from(self, workplace, image_folder):
        words = f"--data {image_folder} --img-size 16 --batch-size 8 --patch-size 4 --depth 2 --width 48 --heads 3"
        words += " --epochs 60st --val-interval 60st --log-interval 10st"
        words += " --lr 3e-3 --mixup-prob 1 --diversity cutmix --mixing 1 --out run"
        assert pdvit(["train", *words.split()]) == 0
        last = read_records(workplace / "run", "train")[-1]
        # The class loss can't fall below the entropy of an image's classes, 0.3 on average; nor could the mixing term
        # if a patch learned the classes of its image instead of its own.
        assert last["mixing"] < 0.1 < 0.15 < last["class"]

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
    def test_a_compiled_step_equals_an_eager_one(self, train, device):
        """With SGD, since AdamW turns rounding of tiny gradients into steps; without TF32 for the same reason."""
        flags = ["--diversity", "released", "--koleo", "0.1", "--spectral", "0.1", "--mixing-schedule", "warmup:3st"]
        flags += ["--opt", "sgd", "--lr", "0.1", "--device", device, "--no-tf32"]
        plain, compiled = train(*flags, out="plain"), train(*flags, "--compile", out="compiled")
        ours, theirs = (load_file(run / "model.safetensors") for run in (compiled, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class TestSettings:
    def test_a_named_model_takes_its_shape_from_flags_and_arguments(self, train):
        flags = "--model deit_tiny_distilled_patch16_224 --depth 3 --width 24 --heads 2 --patch-size 16 --img-size 32"
        run = train(*flags.split(), "--model-kwargs", "qk_norm=true", base=[])
        found = read_json(run / "config.json")
        assert found["architecture"] == "deit_tiny_distilled_patch16_224"
        names = ("depth", "embed_dim", "num_heads", "patch_size", "qk_norm")
        assert [found["model_args"][name] for name in names] == [3, 24, 2, 16, True]
        assert load_file(run / "model.safetensors")["pos_embed"].shape == (1, 2 + 4, 24)

    def test_flags_win_over_the_file_and_set_over_flags(self, train, workplace):
        lines = ["[optim]", "lr = 1e-3", "min_lr = 1e-7", "weight_decay = 0.3", "[data]", "split_seed = 5"]
        (workplace / "mine.toml").write_text("\n".join(lines))
        flags = ["--lr", "2e-3", "--min-lr", "2e-7", "--set", "optim.lr=3e-3", "--set", "optim.lr=4e-3"]
        run = train("--config", "mine.toml", *flags, "--set", "run.seed=7")
        optim = read_recipe(run)["optim"]
        assert (optim["lr"], optim["min_lr"], optim["weight_decay"]) == (4e-3, 2e-7, 0.3)
        assert (read_recipe(run)["data"]["split_seed"], read_recipe(run)["run"]["seed"]) == (5, 7)

    def test_the_seed_decides_the_weights(self, train, preset_run):
        assert weights(train("--seed", 0)) == weights(preset_run("paper")) != weights(train("--seed", 1, out="other"))


class TestImages:
    def test_a_folder_of_images_is_learned(self, workplace, tiny, image_folder):
        flags = [*tiny, *IMAGES, "--data", str(image_folder), "--epochs", "12", "--diversity", "none", "--lr", "1e-2"]
        assert pdvit(["train", *flags, "--name", "run"]) == 0
        run = workplace / "runs" / "run"
        assert read_json(run / "config.json")["label_names"] == ["blue", "green", "red"]
        assert read_json(run / "summary.json")["split"] == "val"
        assert read_json(run / "summary.json")["accuracy"] == 1  # the classes are colours
        assert [record["step"] for record in read_records(run, "eval")] == list(range(4, 49, 4))

    def test_image_files_with_every_augmentation_repeat_bit_for_bit(self, train, image_folder, capsys):
        flags = ["--data", image_folder, "--batch-size", "8", "--img-size", "16", "--reprob", "0.5", "--hflip", "0.25"]
        flags += ["--drop-path", "0.3", "--set", "run.seed=3", "--cosine", "0.5"]
        run = train(*flags, "--scale", "0.5", "1", "--ratio", "0.8", "1.25", "--resident", "on")
        assert "augmentation: crop of 50% to 100%, flip 25%" in capsys.readouterr().out
        assert pdvit(["train", "--config", "run/run.toml", "--out", "again"]) == 0
        again = run.with_name("again")
        for read in (weights, read_records, read_recipe, lambda path: read_json(path / "config.json")):
            assert read(again) == read(run)

    def test_an_image_that_does_not_decode_ends_a_resumable_run(self, train, tiny, refusal, image_folder, workplace):
        flags = [*IMAGES, "--data", image_folder, "--save-every", "1st"]
        whole = train(*flags, out="whole")
        broken = image_folder / "train" / "green" / "3.png"
        sound = broken.read_bytes()
        broken.write_bytes(sound[: len(sound) // 2])
        found = refusal("train", *tiny, *SHORT, *flags, "--out", "run", where="3.png", tip="on_bad_image=skip")
        assert "--resume run" in found.tip
        status = read_json(workplace / "run" / "status.json")
        assert status["status"] == "failed"
        assert "decode" in status["reason"]
        broken.write_bytes(sound)
        assert pdvit(["train", "--resume", "run"]) == 0
        assert weights(workplace / "run") == weights(whole)

    @pytest.mark.slow
    def test_bad_images_are_skipped_and_counted(self, workplace, image_folder, tiny, capsys):
        for name in ("train/green/3.png", "val/red/1.png"):
            (image_folder / name).write_bytes(b"torn")
        flags = [*tiny, *IMAGES, "--data", str(image_folder), "--on-bad-image", "skip", "--save-every", "1st"]
        assert pdvit(["train", *flags, "--out", "whole"]) == 0
        shown, whole, parts = capsys.readouterr().out, workplace / "whole", workplace / "parts"
        assert shown.count("green/3.png (not an image)") == shown.count("red/1.png (not an image)") == 1
        assert sum(record["bad_images"] for record in read_records(whole, "train")) == pytest.approx(2)
        assert [record["bad_images"] for record in read_records(whole, "eval")] == [1, 1]
        assert read_json(whole / "summary.json")["accuracy"] * 5 % 1 == pytest.approx(0)  # of the five that decode
        assert pdvit(["train", *flags, "--time-limit", "1e-9min", "--out", "parts"]) == 75
        while pdvit(["train", "--resume", "parts", "--change", "run.time_limit=60min"]) != 0:
            pass
        assert (weights(parts), read_records(parts)) == (weights(whole), read_records(whole))

    def test_the_first_line_comes_before_torch_is_imported(self, image_folder, tmp_path):
        code = "import sys; sys.modules['torch'] = None\nfrom pdvit.cli import run; run(sys.argv[1:])"
        command = [sys.executable, "-c", code, "train", "--data", str(image_folder), "--out", str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.stdout == f"opening {image_folder} ...\n"


class TestErrors:
    """Each prints three lines, exits with 2 and leaves no run directory."""

    @pytest.fixture(autouse=True)
    def _no_run_is_left(self, workplace):
        yield
        assert not list(workplace.rglob("run.toml"))
        assert not (workplace / "runs").exists()

    @pytest.mark.parametrize(
        ("arguments", "what", "tip"),
        [
            ("--model vit_tny_patch16_224", "vit_tny_patch16_224", "vit_tiny_patch16_224"),
            ("--model resnet18", "ResNet", "no convolutional network"),
            ("--cosine-layers 2,x", "no block x", "1 to 8"),
            ("--data digts", "digts", "digits"),
            ("--data torch/cifar100", "", "--data-dir"),
            ("--img-size 30", "30x30", "32"),
            ("--img-size 16 --shift 16", "16 pixels leaves nothing of images of 16x16", "less than 16"),
            ("--model-kwargs layers=(1,2)", "has no argument 'layers'", "--model-kwargs"),
            ("--model mixer_s32_224 --depth 2", "has no argument 'depth'", "--depth"),
            ("--model-kwargs qk_norm", "qk_norm", "k"),
            ("--model-kwargs global_pool=", "not a logit", "global_pool"),
            ("--batch-size 1201", "1200", "1200"),
            ("--batch-size auto --device cpu", "needs a GPU", "64"),
            ("--change optim.lr=1", "only a resumed run", "--resume"),
            ("--cells 1", "only a sweep has cells", "docs/sweep.md"),
            ("--gpus 2", "--gpus has no effect with --launcher none", "--launcher local or slurm"),
            ("--launcher local --set launch.mem=1G", "--mem has no effect with --launcher local", "--launcher slurm"),
            ("--resume auto", "no run to resume", "start one"),
            ("--resume run --lr 1", "keeps its saved configuration, so --lr", "--change"),
            ("--resume run --set optim.lr=1", "keeps its saved configuration, so --set", "--change"),
            ("--out /proc", "exists", "another --out"),
        ],
    )
    def test_bad_input_is_named(self, refusal, arguments, what, tip):
        refusal("train", *arguments.split(), what=what, tip=tip)
