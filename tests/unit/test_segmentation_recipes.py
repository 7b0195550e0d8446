"""Every segmentation recipe agrees with its source and its row of the table."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch

from pdvit.cli import run as pdvit
from pdvit.config import Config, resolve
from pdvit.config.schema import TERMS
from pdvit.errors import UserError
from pdvit.models.segmentation.segmenter import build_segmenter
from pdvit.tasks.segmentation import SegmentationTask
from tests.unit.test_recipes import (
    FILES,
    SEGMENTATION,
    check_rates,
    check_row,
    rates,
    recipe,
    second_phase,
    step_schedule,
    vit,
)

ADE20K, CITYSCAPES, CAMVID, SCENES = (20_210, 150), (2_975, 19), (367, 11), (4_096, 11)  # training images, classes
AUTHORS = 234.0  # millions, as their README says of both


class Expected(NamedTuple):
    """Published numbers, or the arithmetic of the model's structure."""

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
# The fast tests build these; the others differ in numbers only.
QUICK = ("ade20k-swin-l", "camvid-small", "scenes")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXPECTED]
)


def test_every_recipe_has_an_expectation():
    assert set(EXPECTED) == set(SEGMENTATION)


@pytest.fixture
def started(monkeypatch):
    """Return a function that runs a command up to the start of training and returns its configuration."""

    def start(*arguments: str) -> Config:
        found: list[Config] = []
        monkeypatch.setattr("pdvit.cli.train.start", lambda command, config, *_: found.append(config) or 0)
        assert pdvit([*arguments]) == 0
        return resolve(found[0])

    return start


@every_recipe
def test_settings_and_learning_rate_are_as_expected(name, started):
    config, expected = recipe(name), EXPECTED[name]
    # `segment` has its own defaults: a file that left one of them unset would be another run in `train`.
    assert started("segment", "--config", str(FILES[name])) == started("train", "--config", str(FILES[name])) == config
    assert not any(getattr(config.diversity, term) for term in TERMS)
    side = config.segment.short_side or 64
    assert (config.segment.crop, config.segment.short_side) == (expected.crop, expected.short_side)
    assert tuple(factor * side for factor in config.segment.jitter) == expected.sides
    assert config.optim.schedule == expected.schedule
    check_rates(config, expected.images, expected.lr, expected.floor, expected.steps, expected.warmup)


@every_model
def test_the_model_has_the_expected_number_of_parameters(name):
    with torch.device("meta"):
        model = build_segmenter(recipe(name), EXPECTED[name].classes)
    found, expected = sum(weight.numel() for weight in model.parameters()), EXPECTED[name]
    assert (round(found / 1e6) if isinstance(expected.parameters, float) else found) == expected.parameters
    check_row(name, found, expected.steps)


def test_scenes_is_segment_without_arguments(started):
    found = recipe("scenes")
    assert replace(found, run=replace(found.run, name=None)) == started("segment")


@pytest.mark.parametrize("name", ["ade20k-swin-l", "ade20k-vit-b"])
def test_the_other_weights_in_its_comment_replace_ours(name, started):
    (command,) = re.findall(r"^#\s+pdvit (segment [a-z].+)$", FILES[name].read_text(encoding="utf-8"), re.MULTILINE)
    _, weights, _, file = words = shlex.split(command)
    assert Path(file).name == FILES[name].name
    assert started(*words[:-1], str(FILES[name])).model == replace(recipe(name).model, init=weights)
    assert weights in timm.list_pretrained(f"{recipe(name).model.name}.*")


def test_ade20k_is_resumed_to_200k():
    (changes, longer), config = second_phase("ade20k-swin-l"), recipe("ade20k-swin-l")
    assert changes == {"optim.epochs": "200000st", "model.drop_path": "0.5"}
    assert config.model.drop_path == 0.3
    assert step_schedule(config, ADE20K[0]).stop_after == 160_000
    at = rates(longer, step_schedule(longer, ADE20K[0]), [160_000, 200_000])
    assert at == pytest.approx([6e-5 * 40_000 / 198_500, 0], abs=1e-15)
    assert at[0] == pytest.approx(1.2e-5, rel=0.01)  # theirs: the line over 200,000 steps, warm-up included


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
