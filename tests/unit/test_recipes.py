"""Every recipe of experiments/recipes is what its name and its row of the table say; nothing is trained here."""

import math
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pdvit.config import Config, build, read_toml, resolve
from pdvit.config.resolve import with_crop
from pdvit.engine.schedule import make_lr_scheduler, make_step_schedule
from pdvit.models.build import model_arguments, patch_size_of, sketch_model
from pdvit.models.description import Described
from pdvit.models.initial import settle
from pdvit.models.matching import Chosen
from pdvit.models.tokens import DiverseModel
from pdvit.tasks.base import weight_schedules

FOLDER = Path(__file__).parents[2] / "experiments" / "recipes"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
# Where a setting can come from, as the head of the table explains.
SOURCES = ("README", "draft", "main.py", "models.py", "configs", "timm", "DeiT", "Swin", "mmseg", "ours")
SOURCES += ("the row's name", "the run of")
IMAGENET = 1_281_167
DEIT, VIT_L, SWIN, SWIN_22K = 5e-4, 5e-5, 5e-4, 2e-5  # learning rates for 512 images
TIMM = "timm, results/results-imagenet.csv, param_count"


class Expected(NamedTuple):
    """What a recipe has to come to: published numbers, or the arithmetic of the model's structure."""

    images: int
    classes: int
    pixels: int
    patch: int
    parameters: float | int  # millions as published, else exactly as the structure gives
    source: str
    lr: float
    floor: float
    warmup: float  # epochs
    epochs: float


def vit(depth, width, patch, pixels, classes):
    """Count the parameters of a ViT: blocks of 12 d² + 13 d, embedding, class token, positions, norm, classifier."""
    patches = (pixels // patch) ** 2
    blocks = depth * (4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 4 * width)
    outside = 3 * patch**2 * width + width + width + (patches + 1) * width + 2 * width
    return blocks + outside + width * classes + classes


def deit_224(parameters, source, batch, epochs):
    return Expected(IMAGENET, 1000, 224, 16, parameters, source, DEIT * batch / 512, 1e-7, 5, epochs)


def deit_384(parameters, source):
    return Expected(IMAGENET, 1000, 384, 16, parameters, source, 5e-6, 1e-6, 5, 30)


def vit_l(pixels, parameters):
    return Expected(IMAGENET, 1000, pixels, 16, parameters, TIMM, VIT_L * 128 / 512, 1e-7, 5, 40)


def swin(parameters):
    return Expected(IMAGENET, 1000, 224, 32, parameters, TIMM, SWIN * 1024 / 512, 5e-6 * 1024 / 512, 20, 300)


AUTHORS, STRUCTURE = "the authors' README", "structure"
EXPECTED = {
    "deit-s12-224": deit_224(22.05, TIMM, 1024, 360),
    "deit-s24-224": deit_224(vit(24, 384, 16, 224, 1000), STRUCTURE, 1024, 360),
    "deit-b12-224": deit_224(86.57, TIMM, 576, 300),
    "deit-b24-224": deit_224(172, AUTHORS, 576, 300),
    "deit-s12-384": deit_384(22.20, TIMM),  # vit_small_patch16_384
    "deit-s24-384": deit_384(vit(24, 384, 16, 384, 1000), STRUCTURE),
    "deit-b12-384": deit_384(86.86, TIMM),
    "deit-b24-384": deit_384(vit(24, 768, 16, 384, 1000), STRUCTURE),
    "vit-l24-224": vit_l(224, 304.33),
    "vit-l24-384": vit_l(384, 304.72),
    "swin-t-224": swin(28.29),
    "swin-s-224": swin(49.61),
    "swin-b-224": swin(87.77),
    "swin-l-384": Expected(IMAGENET, 1000, 384, 32, 196.74, TIMM, SWIN_22K * 1024 / 512, 2e-7 * 1024 / 512, 5, 30),
    # a tenth of train is held out where there is no val
    "cifar100-12": Expected(45_000, 100, 32, 4, vit(12, 192, 4, 32, 100), STRUCTURE, 1e-3, 1e-6, 10, 200),
    "cifar100-24": Expected(45_000, 100, 32, 4, vit(24, 192, 4, 32, 100), STRUCTURE, 1e-3, 1e-6, 10, 200),
    "cifar100-small": Expected(45_000, 100, 32, 4, vit(8, 48, 4, 32, 100), STRUCTURE, 1e-3, 1e-6, 0.3, 3),
    "tiny-imagenet-50": Expected(25_000, 50, 64, 8, vit(12, 192, 8, 64, 50), STRUCTURE, 1e-3, 1e-6, 10, 200),
    "tiny-imagenet-50-small": Expected(25_000, 50, 64, 8, vit(8, 48, 8, 64, 50), STRUCTURE, 1e-3, 1e-6, 0.4, 4),
    "pets-small": Expected(270, 3, 64, 8, vit(8, 48, 8, 64, 3), STRUCTURE, 1e-3, 1e-6, 1, 20),
    "pets-224": Expected(270, 3, 224, 16, vit(12, 192, 16, 224, 3), STRUCTURE, 2e-4, 1e-6, 1, 10),
    "digits": Expected(1_200, 10, 32, 4, vit(8, 48, 4, 32, 10), STRUCTURE, 1e-3, 1e-6, 1.2, 24),
}
# The quick suite builds one of each kind; deeper and larger ones differ in numbers only.
QUICK = ("deit-s12-224", "vit-l24-224", "swin-t-224", "cifar100-small", "pets-small", "digits")
every_recipe = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXPECTED]
)
SEGMENTATION = [name for name in FILES if re.search("ade20k|cityscapes|camvid|scenes", name)]
COMMANDS = {name: "finetune" if re.search("-384|vit-l|pets", name) else "train" for name in EXPECTED}
COMMANDS |= dict.fromkeys(SEGMENTATION, "segment")


def recipe(name: str) -> Config:
    """Return a recipe as the command reads it: an unknown key or a value out of range raises."""
    return resolve(build((str(FILES[name]), read_toml(FILES[name]))))


@cache
def wrapped(name):
    """Return the recipe's model on the meta device, first and last found: where they can't be read, this raises."""
    config = recipe(name)
    arguments = model_arguments(config.model, config.data.img_size)
    arguments |= {"num_classes": EXPECTED[name].classes, "weight_init": "skip"}  # drawing weights takes half the time
    assert config.model.name is not None
    return DiverseModel(sketch_model(config.model.name, arguments))


@cache
def parameters_of(name):
    return sum(weight.numel() for weight in wrapped(name).model.parameters())


def rates(config, plan, steps):
    """Return the learning rate at some steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim.lr)
    scheduler, found = make_lr_scheduler(optimizer, config, plan), []
    for step in steps:
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def rows() -> dict[str, list[str]]:
    """Return the cells of the table's rows by the recipe that the first cell links to."""
    found = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if match := re.fullmatch(r"\[([\w-]+)\]\(\1\.toml\)", cells[0]):
            assert match[1] not in found, "a recipe has one row"
            found[match[1]] = cells[1:]
    return found


def test_every_recipe_has_a_row_and_an_expectation():
    """Those of segmentation have theirs in test_segmentation_recipes.py."""
    assert set(rows()) == set(FILES) == {*EXPECTED, *SEGMENTATION}


@pytest.mark.parametrize("name", FILES)
class TestFile:
    def test_it_resolves_to_itself(self, name):
        assert resolve(recipe(name)) == recipe(name)
        assert recipe(name).run.name == name

    def test_its_first_line_is_the_command(self, name):
        first = FILES[name].read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# pdvit {COMMANDS[name]} --config experiments/recipes/{name}.toml"
        config = recipe(name)
        assert (config.segment.head is not None) == (COMMANDS[name] == "segment")
        if COMMANDS[name] != "segment":
            assert (config.model.init is not None) == (COMMANDS[name] == "finetune")

    def test_every_setting_says_where_it_comes_from(self, name):
        section = ""
        for line in FILES[name].read_text(encoding="utf-8").splitlines():
            section = line if line.startswith("[") else section
            key, equals, rest = line.partition(" = ")
            if line.startswith("#") or not equals or key in ("source", "name", "stop_after"):
                continue
            _, hash_, comment = rest.rpartition("  # ")
            assert hash_, f"{section} {line}"
            assert comment.startswith(SOURCES), f"{section} {line}"


@pytest.mark.parametrize("name", EXPECTED)
class TestLearningRate:
    def test_the_learning_rate_runs_as_expected(self, name):
        expected, config = EXPECTED[name], recipe(name)
        per_epoch = expected.images // config.data.batch_size
        plan = make_step_schedule(config, per_epoch, config.data.batch_size)
        total, warmup = round(expected.epochs * per_epoch), round(expected.warmup * per_epoch)
        assert (plan.total, plan.warmup) == (total, warmup)

        def formula(step):
            span = expected.lr - expected.floor
            if step < warmup:
                return expected.floor + span * step / warmup
            if config.optim.schedule == "constant":
                return expected.lr
            return expected.floor + span * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

        steps = [0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total]
        found = rates(config, plan, steps)
        assert found == pytest.approx([formula(step) for step in steps], rel=1e-6)
        assert found[2] == pytest.approx(expected.lr)
        assert found[-1] == pytest.approx(expected.lr if config.optim.schedule == "constant" else expected.floor)
        assert len(weight_schedules(config, per_epoch, config.data.batch_size)) == 5


@every_recipe
class TestModel:
    def test_the_model_has_the_published_number_of_parameters(self, name):
        expected, found = EXPECTED[name].parameters, parameters_of(name)
        if isinstance(expected, int) and expected > 1000:
            assert found == expected
        else:
            digits = len(f"{expected}".partition(".")[2])
            assert round(found / 1e6, max(digits, 2) if digits else 0) == expected

    def test_patches_are_those_that_the_grid_says(self, name):
        expected, model = EXPECTED[name], wrapped(name)
        assert patch_size_of(model.model) == expected.patch
        assert model.patch_head.out_features == expected.classes

    def test_its_row_says_the_same(self, name):
        config = recipe(name)
        _, _, parameters, epochs, batch, _, _ = rows()[name]
        assert float(parameters) == round(parameters_of(name) / 1e6, 2)
        more = re.fullmatch(r"(\d+)(?: \+ (\d+))?", epochs)
        assert more
        assert float(more[1]) == EXPECTED[name].epochs
        assert bool(more[2]) == (config.run.stop_after is not None)
        devices, _, share = batch.split()
        assert int(devices) * int(share) == config.data.batch_size
        assert int(share) % (config.data.micro_batch or int(share)) == 0


@pytest.mark.parametrize("name", ["deit-s12-384", "swin-t-224", "cifar100-small"])
def test_first_and_last_come_out_of_the_model(name):
    expected = EXPECTED[name]
    output = wrapped(name)(torch.zeros(2, 3, expected.pixels, expected.pixels, device="meta"))
    patches = (expected.pixels // expected.patch) ** 2
    assert output.logits.shape == (2, expected.classes)
    assert output.first.shape == output.last.shape
    assert output.last.shape[:2] == (2, patches)
    assert output.patch_logits.shape == (2, patches, expected.classes)


@pytest.mark.parametrize("name", ["deit-b12-224", "deit-b24-224"])
def test_the_second_phase_can_follow_the_first(name):
    """The command in its comment makes the run longer, with the published drop path, and nothing else."""
    text = FILES[name].read_text(encoding="utf-8")
    (command,) = re.findall(r"^#\s+(pdvit train --resume .+)$", text, re.MULTILINE)
    words = shlex.split(command)
    assert words[3] == f"runs/{name}"
    changes = dict(word.split("=") for word in words[4:] if word != "--change")
    assert changes == {"optim.epochs": "400", "model.drop_path": "0.75"}
    config = recipe(name)
    per_epoch = IMAGENET // config.data.batch_size
    assert config.model.drop_path == 0.5
    assert make_step_schedule(config, per_epoch, config.data.batch_size).stop_after == 300 * per_epoch
    longer = replace(config, optim=replace(config.optim, epochs=changes["optim.epochs"]))
    at = rates(longer, make_step_schedule(longer, per_epoch, config.data.batch_size), [300 * per_epoch])
    assert at == pytest.approx([8.445e-5], rel=1e-4)  # 295 of the 395 epochs of its cosine: 5.625e-4 (1 + cos θ) / 2


def test_a_finetuned_row_begins_where_its_base_ends():
    for name in FILES:
        model = recipe(name).model
        if model.init is not None and model.init.startswith("runs/"):
            base = recipe(model.init.removeprefix("runs/"))
            assert base.run.name == model.init.removeprefix("runs/")
            shape = [(one.depth, one.width, one.heads, one.patch_size) for one in (base.model, model)]
            assert shape[0] == shape[1]
            assert base.diversity.preset == "paper"


def test_digits_is_what_train_does_without_arguments():
    found, expected = recipe("digits"), resolve(Config())
    assert replace(found, run=replace(found.run, name=None)) == expected


@pytest.mark.parametrize(
    "name",
    [  # the quick suite has the one whose crop is no multiple of its patches, and a plain model
        pytest.param(name, marks=[] if name in ("cityscapes-swin-l", "camvid-small") else [pytest.mark.slow])
        for name in FILES
        if recipe(name).model.init
    ],
)
def test_it_can_begin_with_its_weights(name, monkeypatch):
    """With weights of its own model at that model's own size, on the meta device: what is looked at before training."""
    config = build((str(FILES[name]), read_toml(FILES[name])))
    sketch = sketch_model(config.model.name, model_arguments(config.model, None))
    chosen = Chosen(dict(sketch.state_dict()), "", "raw")
    described = Described("init", "init", config.model.name, {}, sketch, chosen, {}, {})
    monkeypatch.setattr("pdvit.models.initial.fingerprint", lambda _: "0123456789abcdef")
    settled = resolve(settle(with_crop(config), described))
    assert settled.segment.crop == config.segment.crop
