"""Every recipe of experiments/recipes agrees with its name and its row of the table; nothing is trained here."""

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
from pdvit.models.loading import apply_checkpoint_defaults
from pdvit.models.matching import SelectedWeights
from pdvit.models.resolved_checkpoint import ResolvedCheckpoint
from pdvit.models.tokens import DiverseModel

FOLDER = Path(__file__).parents[2] / "experiments" / "recipes"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
IMAGENET = 1_281_167
DEIT, VIT_L, SWIN, SWIN_22K = 5e-4, 5e-5, 5e-4, 2e-5  # learning rates for 512 images
TIMM = "timm, results/results-imagenet.csv, param_count"


class Expected(NamedTuple):
    """Published numbers, or the arithmetic of the model's structure."""

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
# The fast tests build one of each family; deeper and larger ones differ in numbers only.
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


def step_schedule(config, images):
    return make_step_schedule(config, images // config.data.batch_size, config.data.batch_size)


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
def test_a_file_resolves_to_itself_and_names_its_command(name):
    config = recipe(name)
    assert resolve(config) == config
    assert config.run.name == name
    first = FILES[name].read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# pdvit {COMMANDS[name]} --config experiments/recipes/{name}.toml"
    assert (config.segment.head is not None) == (COMMANDS[name] == "segment")
    assert COMMANDS[name] == "segment" or (config.model.init is not None) == (COMMANDS[name] == "finetune")


def check_rates(config, images, lr, floor, total, warmup):
    """Compare the learning rate with its formula at the corners of the schedule."""
    found = step_schedule(config, images)
    assert (found.total, found.warmup) == (total, warmup)

    def formula(step):
        done = (step - warmup) / (total - warmup)
        if step < warmup:
            return floor + (lr - floor) * step / warmup
        shape = {"constant": 1, "poly": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.optim.schedule]
        return floor + (lr - floor) * shape

    steps = [0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total]
    assert rates(config, found, steps) == pytest.approx([formula(step) for step in steps], rel=1e-6, abs=1e-15)


def check_row(name, parameters, length):
    """Compare the recipe with its row in the table of the page."""
    config = recipe(name)
    _, _, millions, lengths, batch, *_ = rows()[name]
    assert float(millions) == round(parameters / 1e6, 2)
    first, _, more = lengths.replace(",", "").partition(" + ")
    assert float(first) == length
    assert bool(more) == (config.run.stop_after is not None)
    devices, _, images = batch.split()
    assert int(devices) * int(images) == config.data.batch_size
    assert int(images) % (config.data.micro_batch or int(images)) == 0


@pytest.mark.parametrize("name", EXPECTED)
def test_the_learning_rate_is_as_expected(name):
    expected, config = EXPECTED[name], recipe(name)
    per_epoch = expected.images // config.data.batch_size
    total, warmup = round(expected.epochs * per_epoch), round(expected.warmup * per_epoch)
    check_rates(config, expected.images, expected.lr, expected.floor, total, warmup)


@every_recipe
def test_the_model_has_the_published_number_of_parameters(name):
    expected, model = EXPECTED[name], wrapped(name)
    found = sum(weight.numel() for weight in model.model.parameters())
    if isinstance(expected.parameters, int) and expected.parameters > 1000:
        assert found == expected.parameters
    else:
        digits = len(f"{expected.parameters}".partition(".")[2])
        assert round(found / 1e6, max(digits, 2) if digits else 0) == expected.parameters
    assert patch_size_of(model.model) == expected.patch
    assert model.patch_head.out_features == expected.classes
    check_row(name, found, expected.epochs)


def second_phase(name: str) -> tuple[dict[str, str], Config]:
    """Return the changes of the command in a recipe's comment that makes its run longer, and the longer recipe."""
    (command,) = re.findall(r"^#\s+(pdvit .+ --resume .+)$", FILES[name].read_text(encoding="utf-8"), re.MULTILINE)
    words, config = shlex.split(command), recipe(name)
    assert words[1:4] == [COMMANDS[name], "--resume", f"runs/{name}"]
    changes = dict(word.split("=") for word in words[4:] if word != "--change")
    return changes, replace(config, optim=replace(config.optim, epochs=changes["optim.epochs"]))


@pytest.mark.parametrize("name", ["deit-b12-224", "deit-b24-224"])
def test_the_second_phase_follows_the_first(name):
    """It makes the run longer, with the published drop path, and changes nothing else."""
    (changes, longer), config = second_phase(name), recipe(name)
    assert changes == {"optim.epochs": "400", "model.drop_path": "0.75"}
    assert config.model.drop_path == 0.5
    end = 300 * (IMAGENET // config.data.batch_size)
    assert step_schedule(config, IMAGENET).stop_after == end
    at = rates(longer, step_schedule(longer, IMAGENET), [end])
    assert at == pytest.approx([8.445e-5], rel=1e-4)  # 295 of the 395 epochs of its cosine: 5.625e-4 (1 + cos θ) / 2


def test_a_finetuned_recipe_starts_from_the_model_of_its_base():
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
    """With weights of its own model at that model's own size, on the meta device: the checks before training."""
    config = build((str(FILES[name]), read_toml(FILES[name])))
    sketch = sketch_model(config.model.name, model_arguments(config.model, None))
    selected = SelectedWeights(dict(sketch.state_dict()), "", "raw")
    checkpoint = ResolvedCheckpoint("init", "init", config.model.name, {}, sketch, selected)
    monkeypatch.setattr("pdvit.models.loading.fingerprint", lambda _: "0123456789abcdef")
    settled = resolve(apply_checkpoint_defaults(with_crop(config), checkpoint))
    assert settled.segment.crop == config.segment.crop
