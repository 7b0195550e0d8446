import json
import math
import shutil
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pdvit.cli import run as pdvit
from pdvit.models.weights import load

SHORT = ["--epochs", "2st", "--batch-size", "32", "--log-interval", "1st"]
TERMS = {"cosine", "contrastive", "mixing"}


@pytest.fixture
def trained(workplace, tiny):
    """Return a function that trains two steps and returns the run directory."""

    def train(*flags: object, out: str = "run", base: list[str] | None = None) -> Path:
        arguments = [*(tiny if base is None else base), *SHORT, *map(str, flags), "--out", out]
        assert pdvit(["train", *arguments]) == 0
        return workplace / out

    return train


def recipe(run: Path) -> dict:
    return tomllib.loads((run / "run.toml").read_text())


def model_arguments(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["model_args"]


def checkpoint_keys(run: Path) -> set[str]:
    newest = (run / "checkpoints" / "last").read_text().strip()
    return set(load_file(run / "checkpoints" / newest / "module.safetensors"))


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def test_a_run_leaves_the_files_of_the_design(digits_run):
    assert {path.name for path in digits_run.iterdir()} == {
        "model.safetensors",
        "config.json",
        "run.toml",
        "environment.json",
        "status.json",
        "summary.json",
        "metrics.jsonl",
        "checkpoints",
    }
    pointed = digits_run / "checkpoints" / (digits_run / "checkpoints" / "last").read_text().strip()
    assert {path.name for path in (digits_run / "checkpoints").iterdir()} == {".lock", "last", pointed.name}


def test_the_summary_has_the_numbers_of_the_design(digits_run):
    summary = json.loads((digits_run / "summary.json").read_text())
    numbers = {"accuracy", "loss", "similarity_first", "similarity_last", "epochs", "steps", "seconds"}
    numbers |= {"steps_skipped", "seconds_by_phase"}
    assert set(summary) == {"task", "split", "weights", "images_per_second"} | numbers
    assert (summary["task"], summary["split"]) == ("classification", "test")
    assert (summary["epochs"], summary["steps"]) == (2, 2 * (1200 // 128))
    assert all(0 <= summary[name] <= 1 for name in ("accuracy", "similarity_first", "similarity_last"))


def test_the_status_of_a_finished_run_says_so(digits_run, records):
    status = json.loads((digits_run / "status.json").read_text())
    best = max(record["accuracy"] for record in records(digits_run, "eval"))
    assert (status["status"], status["step"], status["best"]["accuracy"]) == ("finished", 18, best)


def test_every_evaluation_measures_every_layer(digits_run, records):
    found = records(digits_run, "similarity")
    assert [record["step"] for record in found] == [record["step"] for record in records(digits_run, "eval")] == [9, 18]
    for record in found:
        assert record["layers"] == ["embed", "block 1", "block 2", "norm"]
        assert all(0 < value <= 1 for value in record["similarity"])


def test_all_that_depends_on_the_clock_stands_under_time(digits_run):
    lines = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert not {"seconds", "images_per_second"} & set(line)
    assert all({"seconds", "images_per_second"} <= set(line["time"]) for line in lines if line["kind"] == "train")


def test_the_closing_summary_names_the_run_and_the_next_command(trained, capsys):
    trained()
    shown = capsys.readouterr().out
    assert "run/model.safetensors" in shown
    assert "pdvit analyze run" in shown


def test_json_prints_the_summary_and_nothing_else(trained, capsys):
    run = trained("--json")
    assert json.loads(capsys.readouterr().out) == json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(("preset", "terms", "cutmix"), [("none", set(), 0), ("cutmix", set(), 1), ("paper", TERMS, 1)])
def test_a_preset_switches_terms_patch_head_and_cutmix(trained, records, preset, terms, cutmix):
    run = trained("--diversity", preset)
    for record in records(run, "train"):
        assert TERMS & set(record) == terms
    assert {"patch_head.weight", "patch_head.bias"} & checkpoint_keys(run) == (
        {"patch_head.weight", "patch_head.bias"} if "mixing" in terms else set()
    )
    assert recipe(run)["augment"]["cutmix"] == cutmix
    assert {name: recipe(run)["diversity"][name] for name in TERMS} == {name: float(name in terms) for name in TERMS}


def test_an_explicit_weight_overrides_the_preset(trained, records):
    run = trained("--diversity", "none", "--cosine", "0.5")
    for record in records(run, "train"):
        assert TERMS & set(record) == {"cosine"}
        assert math.isclose(record["loss"], record["class"] + 0.5 * record["cosine"], rel_tol=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_parts(trained, records):
    weights = {"cosine": 0.25, "contrastive": 2, "mixing": 0.5}
    run = trained(*(item for name, weight in weights.items() for item in (f"--{name}", weight)))
    for record in records(run, "train"):
        total = record["class"] + sum(weight * record[name] for name, weight in weights.items())
        assert math.isclose(record["loss"], total, rel_tol=1e-5)


def test_the_control_sees_the_images_of_the_mixing_term(trained, records):
    runs = {preset: trained("--diversity", preset, "--mixup-prob", "1", out=preset) for preset in
            ("none", "cutmix", "paper")}  # fmt: skip
    # The first step is taken before any update, so the class losses differ only where the images do.
    first = {preset: records(run, "train")[0]["class"] for preset, run in runs.items()}
    assert math.isclose(first["cutmix"], first["paper"], rel_tol=1e-6)
    assert not math.isclose(first["none"], first["cutmix"], rel_tol=1e-6)


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--depth", "3"], {"depth": 3}),
        (["--width", "24"], {"embed_dim": 24}),
        (["--heads", "2"], {"num_heads": 2}),
        (["--patch-size", "16"], {"patch_size": 16}),
        (["--img-size", "24"], {"img_size": [24, 24]}),
    ],
)
def test_a_shape_flag_changes_the_model(trained, flags, changes):
    plain = {"depth": 2, "embed_dim": 16, "num_heads": 1, "patch_size": 8, "img_size": [32, 32]}
    found = model_arguments(trained(*flags))
    assert {name: found[name] for name in plain} == plain | changes


def test_the_tensors_have_the_shape_that_the_flags_ask_for(trained):
    tensors = load_file(trained("--depth", "3", "--width", "24", "--patch-size", "16") / "model.safetensors")
    assert tensors["patch_embed.proj.weight"].shape == (24, 3, 16, 16)
    assert tensors["pos_embed"].shape == (1, 1 + 4, 24)
    assert "blocks.2.norm1.weight" in tensors
    assert "blocks.3.norm1.weight" not in tensors


def test_a_named_model_takes_flags_and_keyword_arguments(trained):
    shape = ["--model", "deit_tiny_distilled_patch16_224", "--depth", "2", "--width", "24", "--heads", "2"]
    run = trained("--img-size", "32", "--model-kwargs", "qk_norm=true", base=shape)
    assert json.loads((run / "config.json").read_text())["architecture"] == "deit_tiny_distilled_patch16_224"
    tensors = load_file(run / "model.safetensors")
    assert tensors["dist_token"].shape == (1, 1, 24)
    assert tensors["blocks.1.attn.q_norm.weight"].shape == (12,)


def test_a_named_model_has_a_rate_that_grows_with_the_batch(trained):
    assert recipe(trained("--model", "test_vit", base=[]))["optim"]["lr"] == pytest.approx(5e-4 * 32 / 512)


def test_a_folder_of_images_trains(workplace, tiny, image_folder, records):
    flags = ["--data", image_folder, "--batch-size", 6, "--epochs", 2, "--workers", 0, "--img-size", 16]
    assert pdvit(["train", *map(str, [*tiny, *flags])]) == 0
    run = workplace / "runs" / "pictures-paper"
    assert json.loads((run / "config.json").read_text())["label_names"] == ["blue", "green", "red"]
    assert json.loads((run / "summary.json").read_text())["split"] == "val"
    assert [record["step"] for record in records(run, "eval")] == [4, 8]


@pytest.mark.slow
def test_worker_processes_change_nothing(trained, image_folder):
    flags = ["--data", image_folder, "--batch-size", 6, "--img-size", 16]
    alone = trained(*flags, "--workers", 0, out="alone")
    helped = trained(*flags, "--workers", 2, out="helped")
    assert weights(alone) == weights(helped)


def test_an_images_class_can_be_learned_from_a_folder(workplace, tiny, image_folder):
    flags = ["--data", image_folder, "--batch-size", 6, "--epochs", 12, "--workers", 0, "--img-size", 16]
    assert pdvit(["train", *map(str, [*tiny, *flags]), "--diversity", "none", "--lr", "1e-2", "--out", "run"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["accuracy"] == 1  # the classes are colours


def test_the_exported_weights_are_those_of_bare_timm(digits_run):
    with safe_open(digits_run / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=16, num_heads=1, num_classes=10
    )
    assert keys == set(model.state_dict())
    assert not any("patch_head" in key for key in keys)


@torch.no_grad()
def test_timm_loads_a_run_with_equal_logits(digits_run):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = timm.create_model(f"local-dir:{digits_run}", pretrained=True).eval()
    ours = load(digits_run).model
    assert torch.equal(theirs(images), ours(images))
    last = digits_run / "checkpoints" / (digits_run / "checkpoints" / "last").read_text().strip()
    state = load_file(last / "module.safetensors")
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in theirs.state_dict().items())


def test_the_files_that_are_shared_name_no_place_and_no_time(digits_run):
    header = weights(digits_run)[:20_000].decode("latin-1")
    for text in (header, (digits_run / "config.json").read_text()):
        assert str(digits_run.parent) not in text
        assert digits_run.name not in text


@pytest.mark.slow
def test_default_names_get_a_suffix(workplace, tiny):
    for _ in range(3):
        assert pdvit(["train", *tiny, *SHORT]) == 0
    names = {path.name for path in Path("runs").iterdir()}
    assert names == {"digits-paper", "digits-paper-2", "digits-paper-3"}


def test_a_name_is_a_folder_below_runs(workplace, tiny):
    assert pdvit(["train", *tiny, *SHORT, "--name", "mine"]) == 0
    assert Path("runs/mine/model.safetensors").is_file()


class TestRepeating:
    def test_flags_win_over_the_file_and_set_over_flags(self, trained, workplace):
        (workplace / "mine.toml").write_text(
            "[optim]\nlr = 1e-3\nmin_lr = 1e-7\nweight_decay = 0.3\n[data]\nsplit_seed = 5\n"
        )
        run = trained(
            "--config", "mine.toml", "--lr", "2e-3", "--min-lr", "2e-7", "--set", "optim.lr=3e-3", "--set", "run.seed=7"
        )
        optim = recipe(run)["optim"]
        assert (optim["lr"], optim["min_lr"], optim["weight_decay"]) == (3e-3, 2e-7, 0.3)
        assert (recipe(run)["data"]["split_seed"], recipe(run)["run"]["seed"]) == (5, 7)

    def test_the_last_of_several_sets_wins(self, trained):
        run = trained("--set", "optim.lr=3e-3", "--set", "optim.lr=4e-3")
        assert recipe(run)["optim"]["lr"] == 4e-3

    def test_the_recipe_leaves_out_where_the_run_lies(self, digits_run):
        assert not {"out", "name"} & set(recipe(digits_run)["run"])
        assert (digits_run / "run.toml").read_text().startswith("# ")

    def test_the_seed_decides_the_weights(self, trained):
        one, again, other = (
            trained("--set", f"run.seed={seed}", out=out) for seed, out in ((1, "a"), (1, "b"), (2, "c"))
        )
        assert weights(one) == weights(again)
        assert weights(one) != weights(other)


class TestRefused:
    """Each prints three lines, exits with 2 and leaves no run directory."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, workplace):
        yield
        assert not list(workplace.rglob("run.toml"))
        assert not (workplace / "runs").exists()

    @pytest.mark.parametrize(
        ("arguments", "what", "tip"),
        [
            (["--epohs", "2"], "--epohs", "--epochs"),
            (["--model", "vit_tny_patch16_224"], "vit_tny_patch16_224", "vit_tiny_patch16_224"),
            (["--model", "resnet18"], "ResNet", "transformer of timm"),
            (
                ["--model", "swin_tiny_patch4_window7_224", "--depth", "2"],
                "stages of different sizes",
                "--model-kwargs",
            ),
            (["--first", "9"], "no block 9", "from 1 to 8"),
            (["--last", "head"], "head", "norm"),
            (["--cosine-layers", "2,x"], "2,x", "6,12"),
            (["--data", "digts"], "digts", "digits"),
            (["--data", "./absent/photos"], "absent/photos", ""),
            (["--set", "optim.lrr=1"], "optim.lrr", "lr"),
            (["--set", "optm.lr=1"], "optm", "optim"),
            (["--set", "lr=1"], "lr", "optim.lr"),
            (["--diversity", "papr"], "papr", "paper"),
            (["--opt", "adamww"], "adamww", "adamw"),
            (["--sched", "cosin"], "cosin", "cosine"),
            (["--precision", "fp8"], "fp8", "fp"),
            (["--lr", "fast"], "--lr", ""),
            (["--lr", "-1"], "-1", "above 0"),
            (["--lr", "nan"], "nan", "above 0"),
            (["--cosine", "-0.5"], "-0.5", "at least 0"),
            (["--mixup-prob", "1.5"], "1.5", "at most 1"),
            (["--depth", "0"], "0", "at least 1"),
            (["--epochs", "ten"], "ten", "30ep"),
            (["--epochs", "0"], "0", ""),
            (["--epochs", "2st", "--warmup-epochs", "2st"], "warm-up", "shorten"),
            (["--img-size", "30"], "30x30", "32"),
            (["--aa", "augmix-m5"], "augmix", "rand-m9"),
            (["--width", "30", "--heads", "4"], "30", "multiple of 4"),
            (["--model-kwargs", "bogus=1"], "bogus", "--model-kwargs"),
            (["--model-kwargs", "pretrained=true"], "pretrained", "remove"),
            (["--model-kwargs", "checkpoint_path=weights.pth"], "checkpoint_path", "remove"),
            (["--model-kwargs", "qk_norm"], "qk_norm", "k"),
            (["--batch-size", "1201"], "1200", "1200"),
            (["--device", "gpu"], "gpu", "cpu"),
            (["--device", "cuda:99"], "cuda:99", "cpu"),
            (["--config", "absent.toml"], "No such file", ""),
            (["surplus"], "surplus", ""),
            (["--lr"], "--lr", ""),
        ],
        ids=" ".join,
    )
    def test_bad_input_is_named(self, refusal, arguments, what, tip):
        found = refusal("train", *arguments)
        assert what in found.what
        assert tip in found.tip

    def test_a_file_that_is_not_toml(self, refusal, workplace):
        (workplace / "bad.toml").write_text("[optim\nlr = 1")
        assert "TOML" in refusal("train", "--config", "bad.toml").what

    @pytest.mark.parametrize("line", ["[optim]\nlrr = 1", "[optimm]\nlr = 1", "optim = 3", '[optim]\nlr = "fast"'])
    def test_a_file_with_a_bad_key_or_value(self, refusal, workplace, line):
        (workplace / "bad.toml").write_text(line)
        assert "bad.toml" in refusal("train", "--config", "bad.toml").where

    def test_a_folder_without_images_or_classes(self, refusal, workplace):
        (workplace / "photos").mkdir()
        assert "photos" in refusal("train", "--data", "photos").what
        (workplace / "photos" / "train").mkdir()
        assert "class" in refusal("train", "--data", "photos").what

    def test_a_folder_without_validation(self, refusal, image_folder):
        shutil.rmtree(image_folder / "val")
        assert "val" in refusal("train", "--data", image_folder).what

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_a_class_without_images(self, refusal, image_folder, split):
        for path in (image_folder / split / "green").iterdir():
            path.unlink()
        found = refusal("train", "--data", image_folder)
        assert "green" in found.what
        assert split in found.what

    def test_a_class_that_only_validation_has(self, refusal, image_folder):
        shutil.copytree(image_folder / "val" / "red", image_folder / "val" / "violet")
        assert "violet" in refusal("train", "--data", image_folder).what

    def test_fewer_images_than_one_batch(self, refusal, image_folder):
        found = refusal("train", "--data", image_folder, "--batch-size", 25, "--img-size", 16)
        assert "24" in found.what

    def test_a_place_below_a_file(self, refusal, workplace, tiny):
        (workplace / "file").touch()
        assert "Not a directory" in refusal("train", *tiny, "--out", "file/run").what

    def test_a_place_whose_name_is_too_long(self, refusal, tiny):
        assert "too long" in refusal("train", *tiny, "--out", "x" * 300).what

    def test_a_place_that_exists(self, refusal, workplace, tiny):
        (workplace / "taken").mkdir()
        (workplace / "taken" / "precious").write_text("mine")
        found = refusal("train", *tiny, "--out", "taken")
        assert "exists" in found.what
        assert "--resume taken" in found.tip
        assert [path.name for path in (workplace / "taken").iterdir()] == ["precious"]

    @pytest.mark.parametrize("name", ["../outside", "a/b"])
    def test_a_name_that_is_a_path(self, refusal, tiny, name):
        assert name in refusal("train", *tiny, *SHORT, "--name", name).what

    def test_resuming_what_is_no_run(self, refusal, workplace):
        (workplace / "folder").mkdir()
        for name in ("absent", "folder"):
            assert name in refusal("train", "--resume", name).where

    @pytest.mark.parametrize(
        "more", [["--lr", "1"], ["--set", "optim.lr=1"], ["--config", "x.toml"], ["--diversity", "none"]], ids=" ".join
    )
    def test_resuming_with_other_settings(self, refusal, digits_run, more):
        assert "configuration" in refusal("train", "--resume", digits_run, *more).what


def test_an_image_that_does_not_decode_ends_a_run_that_can_go_on(refusal, trained, image_folder, workplace):
    flags = ["--data", image_folder, "--batch-size", 6, "--workers", 0, "--img-size", 16, "--save-every", "1st"]
    flags += ["--epochs", 2]  # after SHORT's own, so that every image is met
    whole = trained(*flags, out="whole")
    broken = image_folder / "train" / "green" / "3.png"
    sound = broken.read_bytes()
    broken.write_bytes(sound[: len(sound) // 2])
    found = refusal("train", "--depth", 2, "--width", 16, "--heads", 1, "--patch-size", 8, "--device", "cpu",
                    *SHORT, *flags, "--out", "run")  # fmt: skip
    assert "3.png" in found.where
    assert "--resume run" in found.tip
    status = json.loads((workplace / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert "decode" in status["reason"]
    broken.write_bytes(sound)
    assert pdvit(["train", "--resume", "run"]) == 0
    assert json.loads((workplace / "run" / "status.json").read_text())["status"] == "finished"
    assert weights(workplace / "run") == weights(whole)


def test_a_loss_that_is_no_number_fails_the_run(workplace, tiny, capsys):
    arguments = ["--epochs", "40st", "--batch-size", "16", "--opt", "sgd", "--lr", "1e30", "--out", "run"]
    assert pdvit(["train", *tiny, *arguments]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert json.loads(Path("run/status.json").read_text())["status"] == "failed"
    assert not Path("run/model.safetensors").exists()


def test_image_files_train_with_every_augmentation_where_the_user_puts_them(trained, image_folder, capsys):
    """Kept on the device on demand; said at the start, with the reason."""
    flags = ["--data", image_folder, "--batch-size", "8", "--img-size", "16", "--aa", "rand-m9-mstd0.5-inc1"]
    flags += ["--reprob", "0.5", "--hflip", "0.25", "--scale", "0.5", "1", "--ratio", "0.8", "1.25"]
    run = trained(*flags, "--resident", "on")
    shown = capsys.readouterr().out
    assert "augmentation: crop of 50% to 100%, flip 25%, RandAugment 9, erase 50%" in shown
    assert "images: on cpu" in shown
    assert recipe(run)["augment"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    again = run.with_name("again")
    assert pdvit(["train", "--config", str(run / "run.toml"), "--out", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_with_the_mixing_term_patches_learn_which_image_they_are_from(workplace, image_folder, records):
    words = f"--data {image_folder} --img-size 16 --batch-size 8 --patch-size 4 --depth 2 --width 48 --heads 3"
    words += " --epochs 60st --lr 3e-3 --mixup-prob 1 --diversity cutmix --mixing 1 --log-interval 10st --out run"
    assert pdvit(["train", *words.split()]) == 0
    last = records(workplace / "run", "train")[-1]
    # The class loss can't fall below the entropy of a picture's classes, 0.3 on average; nor could the mixing term, if
    # a patch knew these classes and not which is its own.
    assert last["mixing"] < 0.1 < 0.15 < last["class"]
