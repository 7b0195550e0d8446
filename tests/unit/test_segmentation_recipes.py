"""Every recipe of segmentation is what its source and its row of the table say; test_recipes.py has what all share."""

import json
import math
import re
import shlex
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pdvit.cli import run as pdvit
from pdvit.config import Config, resolve, to_toml
from pdvit.engine.schedule import make_step_schedule
from pdvit.engine.terminal import EXIT_STOPPED
from pdvit.errors import UserError
from pdvit.models.segmentation.segmenter import Segmenter, build_segmenter
from pdvit.tasks.segmentation import SegmentationTask
from tests.unit.test_recipes import FILES, SEGMENTATION, rates, recipe, rows, vit

ADE20K, CITYSCAPES, CAMVID, SCENES = (20_210, 150), (2_975, 19), (367, 11), (4_096, 11)  # training images, classes
AUTHORS = 234.0  # millions, as their README says of both


class Expected(NamedTuple):
    """What a recipe has to come to: published numbers, or the arithmetic of the model's structure."""

    images: int
    classes: int
    crop: int
    sides: tuple[float, float]  # short side of training images, least and most
    short_side: int | None  # of evaluation
    parameters: float | int  # millions as published, else exactly as the structure gives
    steps: int
    warmup: int
    lr: float
    floor: float
    schedule: str


def upernet(widths, width, classes, aux, neck):
    """Count the parameters of UPerNet (arXiv 1807.10221): convolutions without bias, each with a batch norm.

    A norm for each map; pooled maps of 1, 2, 3 and 6 tokens and what joins them; three laterals and what follows them;
    the fusion of four maps; the classifier. Beside it an FCN of width 256; before it a neck of transposed convolutions.
    """

    def convolution(inside, outside, side):
        return inside * outside * side**2 + 2 * outside

    last = widths[-1]
    pyramid = 4 * convolution(last, width, 1) + convolution(last + 4 * width, width, 3)
    top_down = sum(convolution(one, width, 1) + convolution(width, width, 3) for one in widths[:-1])
    head = sum(2 * one for one in widths) + pyramid + top_down + convolution(4 * width, width, 3)
    head += width * classes + classes
    if aux:
        head += convolution(widths[2], 256, 3) + 256 * classes + classes
    if neck:  # twice by two for the finest map, with a batch norm between; by two for the next
        head += 3 * (last * last * 4 + last) + 2 * last
    return head


def plain(depth, width, patch, crop, classes, head, aux):
    """Count a ViT without its last norm and its classifier, with UPerNet."""
    return vit(depth, width, patch, crop, 0) - 2 * width + upernet([width] * 4, head, classes, aux, neck=True)


EXPECTED = {
    "ade20k-swin-l": Expected(*ADE20K, 512, (512, 2048), 512, AUTHORS, 160_000, 1500, 6e-5, 0, "poly"),
    "cityscapes-swin-l": Expected(*CITYSCAPES, 1025, (512.5, 2050), 1025, AUTHORS, 80_000, 1500, 6e-5, 0, "poly"),
    "ade20k-vit-b": Expected(
        *ADE20K, 512, (256, 1024), 512, plain(12, 768, 16, 512, 150, 512, True), 160_000, 1500, 6e-5, 0, "poly"
    ),
    "cityscapes-vit-b": Expected(
        *CITYSCAPES, 768, (512.5, 2050), 1025, plain(12, 768, 16, 768, 19, 512, True), 80_000, 1500, 6e-5, 0, "poly"
    ),
    "camvid": Expected(
        *CAMVID, 224, (180, 720), 360, plain(12, 192, 16, 224, 11, 128, True), 2250, 45, 2e-4, 1e-6, "cosine"
    ),
    "camvid-small": Expected(
        *CAMVID, 160, (135, 270), 180, plain(8, 48, 8, 160, 11, 32, False), 450, 22, 1e-3, 1e-6, "cosine"
    ),
    "scenes": Expected(*SCENES, 64, (64, 64), None, plain(4, 96, 8, 64, 11, 32, False), 640, 32, 2e-3, 1e-6, "cosine"),
}
every_recipe = pytest.mark.parametrize("name", EXPECTED)
# The quick suite builds these; the others differ in numbers only.
QUICK = ("ade20k-swin-l", "camvid-small", "scenes")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXPECTED]
)


@cache
def segmenter(name: str) -> Segmenter:
    """Return the recipe's model on the meta device."""
    with torch.device("meta"):
        return build_segmenter(recipe(name), EXPECTED[name].classes)


def plan_of(config: Config, images: int) -> Any:
    return make_step_schedule(config, images // config.data.batch_size, config.data.batch_size)


def test_every_recipe_has_an_expectation():
    assert set(EXPECTED) == set(SEGMENTATION)


@every_recipe
class TestRecipe:
    def test_the_command_adds_nothing_to_it(self, name, monkeypatch):
        """`segment` has defaults of its own: a file that left one of them open would be another run in `train`."""
        begun: list[Config] = []
        monkeypatch.setattr("pdvit.cli.train.start", lambda command, config, *_: begun.append(config) or 0)
        assert pdvit(["segment", "--config", str(FILES[name])]) == 0
        assert pdvit(["train", "--config", str(FILES[name])]) == 0
        assert [resolve(config) for config in begun] == [recipe(name)] * 2

    def test_it_has_no_term(self, name):
        diversity = recipe(name).diversity
        assert not any((diversity.cosine, diversity.contrastive, diversity.mixing, diversity.koleo, diversity.spectral))

    def test_images_are_scaled_and_cropped_as_expected(self, name):
        segment, expected = recipe(name).segment, EXPECTED[name]
        side = segment.short_side or 64
        assert (segment.crop, segment.short_side) == (expected.crop, expected.short_side)
        assert tuple(factor * side for factor in segment.jitter) == expected.sides

    def test_the_learning_rate_runs_as_expected(self, name):
        config, expected = recipe(name), EXPECTED[name]
        plan = plan_of(config, expected.images)
        assert (plan.total, plan.warmup, config.optim.schedule) == (expected.steps, expected.warmup, expected.schedule)

        def formula(step):
            span = expected.lr - expected.floor
            if step < expected.warmup:
                return expected.floor + span * step / expected.warmup
            done = (step - expected.warmup) / (expected.steps - expected.warmup)
            share = 1 - done if expected.schedule == "poly" else (1 + math.cos(math.pi * done)) / 2
            return expected.floor + span * share

        steps = [0, plan.warmup // 2, plan.warmup, (plan.warmup + plan.total) // 2, plan.total - 1, plan.total]
        assert rates(config, plan, steps) == pytest.approx([formula(step) for step in steps], rel=1e-6, abs=1e-15)


@every_model
class TestModel:
    def test_the_model_has_the_expected_number_of_parameters(self, name):
        found, expected = sum(weight.numel() for weight in segmenter(name).parameters()), EXPECTED[name].parameters
        assert (round(found / 1e6) if isinstance(expected, float) else found) == expected

    def test_its_row_says_the_same(self, name):
        config, expected = recipe(name), EXPECTED[name]
        _, _, parameters, steps, batch, *_ = rows()[name]
        found = sum(weight.numel() for weight in segmenter(name).parameters())
        assert float(parameters) == round(found / 1e6, 2)
        first, _, more = steps.replace(",", "").partition(" + ")
        assert int(first) == expected.steps
        assert bool(more) == (config.run.stop_after is not None)
        devices, _, share = batch.split()
        assert int(devices) * int(share) == config.data.batch_size


def test_scenes_is_what_segment_does_without_arguments(monkeypatch):
    begun: list[Config] = []
    monkeypatch.setattr("pdvit.cli.train.start", lambda command, config, *_: begun.append(config) or 0)
    assert pdvit(["segment"]) == 0
    found = recipe("scenes")
    assert replace(found, run=replace(found.run, name=None)) == resolve(begun[0])


@pytest.mark.parametrize("name", ["ade20k-swin-l", "ade20k-vit-b"])
def test_the_other_weights_in_its_comment_take_the_place_of_ours(name, monkeypatch):
    begun: list[Config] = []
    monkeypatch.setattr("pdvit.cli.train.start", lambda command, config, *_: begun.append(config) or 0)
    (command,) = re.findall(r"^#\s+pdvit (segment [a-z].+)$", FILES[name].read_text(encoding="utf-8"), re.MULTILINE)
    _, weights, _, file = words = shlex.split(command)
    assert Path(file).name == FILES[name].name
    assert pdvit([*words[:-1], str(FILES[name])]) == 0
    assert resolve(begun[0]).model == replace(recipe(name).model, init=weights)
    assert weights in timm.list_pretrained(f"{recipe(name).model.name}.*")


def second_phase() -> dict[str, str]:
    """Return the changes that the comment of ade20k-swin-l names."""
    text = FILES["ade20k-swin-l"].read_text(encoding="utf-8")
    (command,) = re.findall(r"^#\s+(pdvit segment --resume .+)$", text, re.MULTILINE)
    words = shlex.split(command)
    assert words[3] == "runs/ade20k-swin-l"
    return dict(word.split("=") for word in words[4:] if word != "--change")


def test_ade20k_goes_on_to_200k():
    changes, config = second_phase(), recipe("ade20k-swin-l")
    assert changes == {"optim.epochs": "200000st", "model.drop_path": "0.5"}
    assert config.model.drop_path == 0.3
    assert plan_of(config, ADE20K[0]).stop_after == 160_000
    longer = replace(config, optim=replace(config.optim, epochs=changes["optim.epochs"]))
    at = rates(longer, plan_of(longer, ADE20K[0]), [160_000, 200_000])
    assert at == pytest.approx([6e-5 * 40_000 / 198_500, 0], abs=1e-15)
    assert at[0] == pytest.approx(1.2e-5, rel=0.01)  # theirs: the line over 200,000 steps, warm-up too


@pytest.mark.parametrize("name", ["ade20k-swin-l", "cityscapes-swin-l", "cityscapes-vit-b"])
def test_the_statistics_are_of_all_gpus(name):
    """One image on each of eight GPUs is enough for a batch norm whose statistics they share; no share is not."""
    config, cpu, gpu = recipe(name), torch.device("cpu"), torch.device("cuda")
    assert SegmentationTask.resolve(config, 8, gpu).segment.norm == "batch"
    unset = replace(config, segment=replace(config.segment, norm=None))
    alone = config.data.batch_size == 8
    assert SegmentationTask.resolve(unset, 8, gpu).segment.norm == "batch"
    assert SegmentationTask.resolve(unset, 8, cpu).segment.norm == ("group" if alone else "batch")
    parts = replace(config, data=replace(config.data, micro_batch=1))
    with pytest.raises(UserError, match="one image"):
        SegmentationTask.resolve(parts, 1, gpu)


# Names of the smallest file of each layout, and the recipes that read it.
LAYOUTS = {
    "ade20k": {
        split: (
            f"ADEChallengeData2016/images/{split}/ADE_{short}_{{n:08}}.png",
            f"ADEChallengeData2016/annotations/{split}/ADE_{short}_{{n:08}}.png",
        )
        for split, short in (("training", "train"), ("validation", "val"))
    },
    "cityscapes": {
        split: (
            f"leftImg8bit/{split}/ulm/ulm_{{n:06}}_000019_leftImg8bit.png",
            f"gtFine/{split}/ulm/ulm_{{n:06}}_000019_gtFine_labelIds.png",
        )
        for split in ("train", "val")
    },
    "camvid": {split: (f"images/{split}/{{n}}.png", f"masks/{split}/{{n}}.png") for split in ("train", "val", "test")},
}


def write_layout(root: Path, layout: str) -> Path:
    """Write images of two halves, of values 7 and 8 (classes in all three), and their masks."""
    for split, names in LAYOUTS[layout].items():
        for n in range(16 if "train" in split else 2):
            mask = np.full((40, 48 + n), 7, np.uint8)
            mask[:, 24:] = 8
            noise = np.random.default_rng(n).integers(0, 40, (*mask.shape, 3))
            pixels = (noise + (mask == 8)[..., None] * 180).astype(np.uint8)
            for name, array in zip(names, (pixels, mask), strict=True):
                path = root / name.format(n=n)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    if layout == "ade20k":
        rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{at}\t0.1\t1\t1\tclass {at}" for at in range(1, 151))]
        (root / "ADEChallengeData2016" / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    if layout == "camvid":
        (root / "classes.tsv").write_text("".join(f"{at}\tclass {at}\n" for at in range(11)) + "11\tUnlabelled\n")
    return root


def small(config: Config, data: Path) -> Config:
    """Return the recipe with a small model, small images and two steps; all else stays."""
    assert config.model.name is not None
    sizes: dict[str, Any] = {"depth": 4, "width": 24, "heads": 2}
    if config.model.name.startswith("swin"):
        sizes = {"args": {"embed_dim": 12, "depths": [1, 1, 1, 2], "num_heads": [1, 2, 3, 6], "window_size": 4}}
    segment = replace(config.segment, width=16, crop=33, short_side=33, stride=config.segment.stride and 22)
    run = replace(config.run, device="cpu", eval_every="1ep", stop_after=config.run.stop_after and "2st")
    return replace(
        config,
        data=replace(config.data, source=str(data), workers=0),
        model=replace(config.model, init=None, **sizes),
        segment=segment,
        optim=replace(config.optim, epochs="2st", warmup="1st"),
        run=run,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "scenes"])
def test_it_trains_and_is_evaluated(name, workplace, capsys):
    """The recipe as it stands on a small model and made images in the official layout, and the second phase of one."""
    data = write_layout(workplace / "data", name.partition("-")[0])
    config = small(recipe(name), data)
    (workplace / "small.toml").write_text(to_toml(config, "test"))
    pauses = config.run.stop_after is not None
    assert pdvit(["segment", "--config", "small.toml", "--out", "run"]) == (EXIT_STOPPED if pauses else 0)
    shown = capsys.readouterr().err
    assert "has no effect" not in shown
    if pauses:
        changes = second_phase() | {"optim.epochs": "4st"}
        assert (
            pdvit(["segment", "--resume", "run", *(f"--change={key}={value}" for key, value in changes.items())]) == 0
        )
        assert tomllib.loads((workplace / "run" / "run.toml").read_text())["model"]["drop_path"] == 0.5
    summary = json.loads((workplace / "run" / "summary.json").read_text())
    assert summary["steps"] == (4 if pauses else 2)
    capsys.readouterr()
    assert pdvit(["eval", "run", "--ms", "--flip", "--device", "cpu", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["miou"] <= 1
