"""Every recipe of experiments/recipes agrees with its source and its row of the table; nothing is trained here."""

import copy
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pdvit.config import Config, build, read_toml, resolve
from pdvit.config.resolve import with_crop
from pdvit.engine.schedule import make_lr_scheduler, make_step_schedule
from pdvit.errors import UserError
from pdvit.models.build import model_arguments, sketch_model, strides_of
from pdvit.models.loading import apply_checkpoint_defaults
from pdvit.models.matching import SelectedWeights
from pdvit.models.resolved_checkpoint import ResolvedCheckpoint
from pdvit.models.segmentation.heads import with_norm
from pdvit.models.segmentation.segmenter import build_segmenter
from pdvit.models.tokens import DiverseModel

FOLDER = Path(__file__).parents[2] / "experiments" / "recipes"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
IMAGENET, CIFAR, TINY, PETS = (1_281_167, 1000), (45_000, 100), (25_000, 50), (270, 3)  # training images, classes
ADE20K, CITYSCAPES, CAMVID, SCENES = (20_210, 150), (2_975, 19), (367, 11), (4_096, 11)
DEIT, VIT_L, SWIN, SWIN_22K = 5e-4, 5e-5, 5e-4, 2e-5  # learning rates for 512 images


class Expected(NamedTuple):
    """The numbers of a recipe, as published or by arithmetic."""

    images: int
    classes: int
    pixels: int  # of the image or the crop
    patch: int
    parameters: float | None  # millions, from the authors' READMEs (172 and 234) or timm's results-imagenet.csv
    lr: float
    floor: float
    warmup: float  # epochs; for segmentation, steps
    length: float
    # Of the images of a segmentation:
    sides: tuple[float, float] = (0, 0)  # short side in training, least and most
    short_side: int | None = None  # in evaluation
    schedule: str = "poly"


def deit_224(parameters, batch, epochs):
    return Expected(*IMAGENET, 224, 16, parameters, DEIT * batch / 512, 1e-7, 5, epochs)


def deit_384(parameters):
    return Expected(*IMAGENET, 384, 16, parameters, 5e-6, 1e-6, 5, 30)


def vit_l(pixels, parameters):
    return Expected(*IMAGENET, pixels, 16, parameters, VIT_L * 128 / 512, 1e-7, 5, 40)


def swin(parameters):
    return Expected(*IMAGENET, 224, 32, parameters, SWIN * 1024 / 512, 5e-6 * 1024 / 512, 20, 300)


def small(data, pixels, patch, warmup, epochs, lr=1e-3, floor=1e-6):
    return Expected(*data, pixels, patch, None, lr, floor, warmup, epochs)


CLASSIFICATION = {
    "deit-s12-224": deit_224(22.05, 1024, 360),
    "deit-s24-224": deit_224(None, 1024, 360),
    "deit-b12-224": deit_224(86.57, 576, 300),
    "deit-b24-224": deit_224(172, 576, 300),
    "deit-s12-384": deit_384(22.20),
    "deit-s24-384": deit_384(None),
    "deit-b12-384": deit_384(86.86),
    "deit-b24-384": deit_384(None),
    "vit-l24-224": vit_l(224, 304.33),
    "vit-l24-384": vit_l(384, 304.72),
    "swin-t-224": swin(28.29),
    "swin-s-224": swin(49.61),
    "swin-b-224": swin(87.77),
    "swin-l-384": Expected(*IMAGENET, 384, 32, 196.74, SWIN_22K * 1024 / 512, 2e-7 * 1024 / 512, 5, 30),
    "cifar100-12": small(CIFAR, 32, 4, 10, 200),
    "cifar100-24": small(CIFAR, 32, 4, 10, 200),
    "cifar100-small": small(CIFAR, 32, 4, 0.3, 3),
    "tiny-imagenet-50": small(TINY, 64, 8, 10, 200),
    "tiny-imagenet-50-small": small(TINY, 64, 8, 0.4, 4),
    "pets-small": small(PETS, 64, 8, 1, 20),
    "pets-224": small(PETS, 224, 16, 1, 10, lr=2e-4),
    "digits": small((1_200, 10), 32, 4, 2, 40, lr=2e-3, floor=2e-6),
}
SEGMENTATION = {
    "ade20k-swin-l": Expected(*ADE20K, 512, 4, 234.0, 6e-5, 0, 1500, 160_000, (512, 2048), 512),
    "cityscapes-swin-l": Expected(*CITYSCAPES, 1025, 4, 234.0, 6e-5, 0, 1500, 80_000, (512.5, 2050), 1025),
    "ade20k-vit-b": Expected(*ADE20K, 512, 16, None, 6e-5, 0, 1500, 160_000, (256, 1024), 512),
    "cityscapes-vit-b": Expected(*CITYSCAPES, 768, 16, None, 6e-5, 0, 1500, 80_000, (512.5, 2050), 1025),
    "camvid": Expected(*CAMVID, 224, 16, None, 2e-4, 1e-6, 45, 2250, (180, 720), 360, "cosine"),
    "camvid-small": Expected(*CAMVID, 160, 8, None, 1e-3, 1e-6, 22, 450, (135, 270), 180, "cosine"),
    "scenes": Expected(*SCENES, 64, 8, None, 2e-3, 1e-6, 32, 640, (64, 64), None, "cosine"),
}
EXPECTED = CLASSIFICATION | SEGMENTATION
COMMANDS = {name: "finetune" if re.search("-384|vit-l|pets", name) else "train" for name in CLASSIFICATION}
COMMANDS |= dict.fromkeys(SEGMENTATION, "segment")
# The fast tests build one model of each family; deeper and larger ones differ in numbers only.
QUICK = ("deit-s12-224", "swin-t-224", "pets-small", "camvid-small")


def recipe(name: str) -> Config:
    """Return a recipe as the command reads it: an unknown key or a value out of range raises."""
    return resolve(build((str(FILES[name]), read_toml(FILES[name]))))


def step_schedule(config, images):
    return make_step_schedule(config, images // config.data.batch_size, config.data.batch_size)


def rates(config, schedule, steps):
    """Return the learning rate at some steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim.lr)
    scheduler, found = make_lr_scheduler(optimizer, config, schedule), []
    for step in steps:
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def table_rows() -> dict[str, list[str]]:
    """Return the cells of the table's rows by the recipe that the first cell links to."""
    found = {}
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines():
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if match := re.fullmatch(r"\[([\w-]+)\]\(\1\.toml\)", first):
            assert match[1] not in found, "a recipe has one row"
            found[match[1]] = cells
    return found


def test_every_recipe_has_a_row_and_an_expectation():
    assert set(table_rows()) == set(FILES) == set(EXPECTED)


@pytest.mark.parametrize("name", FILES)
def test_a_file_resolves_to_itself_names_its_command_and_has_the_row_of_the_table(name):
    config, first = recipe(name), FILES[name].read_text(encoding="utf-8").splitlines()[0]
    assert resolve(config) == config
    assert config.run.name == name
    assert first == f"# pdvit {COMMANDS[name]} --config experiments/recipes/{name}.toml"
    assert (config.segment.head is not None) == (COMMANDS[name] == "segment")
    assert COMMANDS[name] == "segment" or (config.model.init is not None) == (COMMANDS[name] == "finetune")
    lengths, batch = table_rows()[name][3:5]
    length, _, more = lengths.replace(",", "").partition(" + ")
    assert (float(length), bool(more)) == (EXPECTED[name].length, config.run.stop_after is not None)
    devices, _, images = batch.split()
    assert int(devices) * int(images) == config.data.batch_size
    assert int(images) % (config.data.micro_batch or int(images)) == 0


@pytest.mark.parametrize("name", EXPECTED)
def test_the_learning_rate_equals_its_formula(name):
    """At the corners of the schedule."""
    expected, config = EXPECTED[name], recipe(name)
    per_epoch = 1 if name in SEGMENTATION else expected.images // config.data.batch_size
    total, warmup = round(expected.length * per_epoch), round(expected.warmup * per_epoch)
    schedule = step_schedule(config, expected.images)
    assert (schedule.total, schedule.warmup) == (total, warmup)

    def formula(step):
        done = (step - warmup) / (total - warmup)
        shapes = {"constant": 1, "poly": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        shape = step / warmup if step < warmup else shapes[config.optim.schedule]
        return expected.floor + (expected.lr - expected.floor) * shape

    steps = [0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total]
    assert rates(config, schedule, steps) == pytest.approx([formula(step) for step in steps], rel=1e-6, abs=1e-15)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXPECTED]
)
def test_the_model_has_the_parameters_of_the_table_as_published(name):
    """The model on the meta device, with first and last tokens found: where they can't be read, this raises."""
    expected, config = EXPECTED[name], recipe(name)
    if name in SEGMENTATION:
        with torch.device("meta"):
            model = build_segmenter(config, expected.classes)
    else:
        arguments = model_arguments(config.model, config.data.img_size)
        arguments |= {"num_classes": expected.classes, "weight_init": "skip"}  # drawing weights takes half the time
        wrapper = DiverseModel(copy.deepcopy(sketch_model(config.model.name, arguments)))
        assert wrapper.patch_head.out_features == expected.classes
        model = wrapper.model
        assert strides_of(model)[-1] == expected.patch
    found = sum(weight.numel() for weight in model.parameters())
    if expected.parameters is not None:
        assert round(found / 1e6, 0 if expected.parameters in (172, 234) else 2) == expected.parameters
    assert float(table_rows()[name][2]) == round(found / 1e6, 2)


@pytest.mark.parametrize(
    ("name", "changes", "drop_path", "at", "expected"),
    [  # 295 of the 395 epochs of the cosine: 5.625e-4 (1 + cos θ) / 2
        (name, {"optim.epochs": "400", "model.drop_path": "0.75"}, 0.5, 300 * (IMAGENET[0] // 576), 8.445e-5)
        for name in ("deit-b12-224", "deit-b24-224")
    ]  # theirs: the line over 200,000 steps, warm-up included, 1.2e-5
    + [("ade20k-swin-l", {"optim.epochs": "200000st", "model.drop_path": "0.5"}, 0.3, 160_000, 6e-5 * 40 / 198.5)],
)
def test_the_second_phase_follows_the_first(name, changes, drop_path, at, expected):
    """The command in the comment makes the run longer, with the published drop path, and changes nothing else."""
    (command,) = re.findall(r"^#\s+(pdvit .+ --resume .+)$", FILES[name].read_text(encoding="utf-8"), re.MULTILINE)
    words, config, images = shlex.split(command), recipe(name), EXPECTED[name].images
    assert words[1:4] == [COMMANDS[name], "--resume", f"runs/{name}"]
    assert dict(word.split("=") for word in words[4:] if word != "--change") == changes
    assert config.model.drop_path == drop_path
    assert step_schedule(config, images).stop_after == at
    longer = replace(config, optim=replace(config.optim, epochs=changes["optim.epochs"]))
    assert rates(longer, step_schedule(longer, images), [at]) == pytest.approx([expected], rel=1e-4)


def test_a_finetuned_recipe_starts_from_the_model_of_its_base():
    for model in (recipe(name).model for name in FILES):
        if model.init is not None and model.init.startswith("runs/"):
            base = recipe(model.init.removeprefix("runs/"))
            shapes = [(one.depth, one.width, one.heads, one.patch_size) for one in (base.model, model)]
            assert shapes[0] == shapes[1]
            assert base.diversity.preset == "paper"


@pytest.mark.parametrize(("name", "command"), [("digits", "train"), ("scenes", "segment")])
def test_two_recipes_are_commands_without_arguments(name, command, started):
    found = recipe(name)
    assert replace(found, run=replace(found.run, name=None)) == resolve(started(command))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if recipe(name).model.init])
def test_it_can_begin_with_its_weights(name, monkeypatch):
    """With weights of its own model at that model's own size, on the meta device: the checks before training."""
    config = build((str(FILES[name]), read_toml(FILES[name])))
    sketch = sketch_model(config.model.name, model_arguments(config.model, None))
    selected = SelectedWeights(dict(sketch.state_dict()), "", "raw")
    checkpoint = ResolvedCheckpoint("init", "init", config.model.name, {}, sketch, selected)
    monkeypatch.setattr("pdvit.models.loading.fingerprint", lambda _: "0123456789abcdef")
    assert resolve(apply_checkpoint_defaults(with_crop(config), checkpoint)).segment.crop == config.segment.crop


@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_segmentation_is_the_same_run_in_train_and_has_the_published_sizes(name, started):
    """`segment` has its own defaults: a file that left one of them unset would be another run in `train`."""
    config, expected = recipe(name), EXPECTED[name]
    for command in ("segment", "train"):
        assert resolve(started(command, "--config", str(FILES[name]))) == config
    assert (config.segment.crop, config.segment.short_side) == (expected.pixels, expected.short_side)
    assert tuple(factor * (config.segment.short_side or 64) for factor in config.segment.jitter) == expected.sides
    assert (config.optim.schedule, config.diversity.preset) == (expected.schedule, "none")


@pytest.mark.parametrize(("name", "alone"), [("ade20k-swin-l", "batch"), ("cityscapes-swin-l", "group")])
def test_a_batch_norm_shares_its_statistics_over_gpus(name, alone):
    """One image on each of eight GPUs is enough; processes on CPUs share none."""
    config, cpu, gpu = recipe(name), torch.device("cpu"), torch.device("cuda")
    unset = replace(config, segment=replace(config.segment, norm=None))
    cases = ((config, 8, gpu), (unset, 8, gpu), (unset, 8, cpu))
    norms = [with_norm(*case).segment.norm for case in cases]
    assert norms == ["batch", "batch", alone]
    with pytest.raises(UserError, match="one image"):
        with_norm(replace(config, data=replace(config.data, micro_batch=1)), 1, gpu)
