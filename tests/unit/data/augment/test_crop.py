import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import _geometry
from torchvision.transforms.v2 import functional as V

from pdvit.config.schema import INTERPOLATIONS
from pdvit.data.augment.crop import DRAWS, crop_batch, crop_boxes, crop_pixels, shift_images
from pdvit.data.randomness import uniform

SCALE, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)


def boxes_of(count, height, width, scale=SCALE, ratio=RATIO, seed=1):
    draws = uniform(seed, torch.arange(count), DRAWS)
    sides = (torch.full((count,), side) for side in (height, width))
    return draws, crop_boxes(draws, *sides, scale, ratio)


def torchvision_box(draws, height, width, scale, ratio):
    """Let torchvision's own transform choose, with our draws instead of its generator's."""
    tries, corner = iter(draws[:-2]), iter(draws[-2:])

    def between(low, high):
        return torch.tensor([low + (high - low) * next(tries)], dtype=torch.float64)

    fake = SimpleNamespace(
        empty=lambda _: SimpleNamespace(uniform_=lambda low, high: between(float(low), float(high))),
        randint=lambda low, high, size: torch.tensor([low + math.floor(next(corner) * (high - low))]),
        exp=torch.exp,
        log=torch.log,
        tensor=torch.tensor,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_geometry, "torch", fake)
        found = v2.RandomResizedCrop(8, scale=scale, ratio=ratio).make_params([torch.empty(3, height, width)])
    return [found[name] for name in ("top", "left", "height", "width")]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.sampled_from([SCALE, (0.08, 1.0), (1.0, 1.0), (0.5, 0.5)]),
    st.sampled_from([RATIO, (1.0, 1.0), (2.0, 3.0)]),
)
def test_the_box_is_the_one_that_torchvision_cuts_for_the_same_draws(height, width, scale, ratio):
    draws, boxes = boxes_of(8, height, width, scale, ratio)
    for row, box in zip(draws.double().tolist(), boxes.tolist(), strict=True):
        expected = torchvision_box(row, height, width, scale, ratio)
        # the logarithm of its ratio is float32: a side that is nearly k + 0.5 may round to the other number
        assert box == pytest.approx(expected, abs=1)
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] >= 1
        assert box[3] >= 1
        assert box[0] + box[2] <= height
        assert box[1] + box[3] <= width


def test_a_box_of_the_whole_image_leaves_it():
    images = torch.randint(256, (4, 3, 9, 9), dtype=torch.uint8)
    whole = torch.tensor([[0, 0, 9, 9]]).expand(4, 4)
    for mode in INTERPOLATIONS:
        assert torch.equal(crop_batch(images, whole, 9, mode), images)


@pytest.mark.parametrize("mode", INTERPOLATIONS)
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (20, 28, 32), (16, 16, 48)])
def test_a_batch_and_single_images_are_resampled_as_torchvision_does(mode, height, width, size):
    noise = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    images = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").to(torch.uint8)
    _, boxes = boxes_of(12, height, width, (0.1, 1.0))
    found = crop_batch(images, boxes, size, mode)
    for image, box, ours in zip(images, boxes.tolist(), found, strict=True):
        array = image.permute(1, 2, 0).numpy().copy()
        reference = V.resized_crop(Image.fromarray(array), *box, [size, size], v2.InterpolationMode(mode))
        expected = V.pil_to_tensor(reference).int()
        for result in (ours, crop_pixels(array, box, size, mode)):
            difference = (result - expected).abs()
            assert difference.max() <= 2
            assert difference.float().mean() < 0.15


@pytest.mark.parametrize("mode", INTERPOLATIONS)
def test_one_level_stays_one_level(mode):
    for level in (0, 1, 254, 255):
        images = torch.full((16, 3, 16, 16), level, dtype=torch.uint8)
        assert (crop_batch(images, boxes_of(16, 16, 16, (0.05, 1.0))[1], 24, mode) == level).all()


def test_the_edges_of_a_box_of_part_pixels_are_rounded():
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10, 1).repeat(3, 2).copy()
    assert crop_pixels(pixels, (2.4, 2.6, 1.2, 1.0), 2, "bilinear").unique().tolist() == [23, 33]
    assert crop_pixels(pixels, (2.4, 2.6, 0.1, 0.1), 2, "bilinear").unique().tolist() == [23]


def slow_shift(image, down, right):
    channels, height, width = image.shape
    moved = torch.empty_like(image)
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                source_row = min(max(row - down, 0), height - 1)
                source_column = min(max(column - right, 0), width - 1)
                moved[channel, row, column] = image[channel, source_row, source_column]
    return moved


def test_shifting_moves_down_and_right_and_repeats_the_border():
    images = torch.randint(256, (5, 2, 4, 6), dtype=torch.uint8)
    # With a reach of 2 there are five offsets, and the middle of each fifth of [0, 1) hits one.
    offsets = [(-2, 2), (-1, 1), (0, 0), (1, -1), (2, -2)]
    draws = torch.tensor([[(down + 2.5) / 5, (right + 2.5) / 5] for down, right in offsets])
    expected = torch.stack([slow_shift(image, *offset) for image, offset in zip(images, offsets, strict=True)])
    assert torch.equal(shift_images(images, 2, draws), expected)


def test_every_shift_is_reached_and_none_beyond():
    images = torch.arange(25.0).view(1, 1, 5, 5).repeat(400, 1, 1, 1)
    draws = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    centres = shift_images(images, 1, draws)[:, 0, 2, 2]
    assert sorted(set(centres.tolist())) == [6, 7, 8, 11, 12, 13, 16, 17, 18]
