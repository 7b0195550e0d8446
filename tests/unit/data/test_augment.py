import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from pdvit.config.schema import INTERPOLATIONS, AugmentConfig
from pdvit.data.augment import (
    CROP_DRAWS,
    ERASE_DRAWS,
    Augmentation,
    crop_batch,
    crop_box,
    crop_pixels,
    erase,
    erase_box,
    shift_images,
)
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.randomness import uniform
from pdvit.data.sources.split import ArraySplit, FileSplit
from tests.unit.data.batches import OnGpu

SIZE, COUNT = 16, 24
PLAIN = Preprocessing(SIZE, 1.0, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
EVERYTHING = {"scale": (0.4, 1.0), "shift": 2, "hflip": 0.5, "reprob": 0.5}
IMAGES = torch.randint(256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def augmentation(files=False, **settings):
    split = FileSplit([], torch.zeros(0)) if files else ArraySplit(IMAGES, torch.zeros(COUNT))
    return Augmentation.for_split(split, AugmentConfig(**settings), PLAIN, 4)


def result(augment, index, epoch=2):
    return augment(augment.crop(IMAGES[index], epoch, index), epoch, index)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=9, unique=True))
def test_an_image_becomes_the_same_in_any_batch(index):
    augment = augmentation(**EVERYTHING)
    whole = result(augment, torch.arange(COUNT))
    assert torch.equal(result(augment, torch.tensor(index)), whole[index])


def test_batches_are_channels_last_in_training_on_a_gpu():
    augment, index = augmentation(**EVERYTHING), torch.arange(COUNT)
    expected, found = (augment(images, 2, index) for images in (IMAGES, IMAGES.as_subclass(OnGpu)))
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert PLAIN.normalise(IMAGES.as_subclass(OnGpu)).is_contiguous()


@pytest.mark.parametrize("changed", [{"scale": (0.4, 1.0)}, {"shift": 2}, {"hflip": 0.5}])
def test_draws_change_with_epoch_sample_and_seed(changed):
    augment = augmentation(**changed)
    index, other = torch.arange(8), torch.arange(8) + 8
    first = result(augment, index)
    assert torch.equal(result(augment, index), first)
    assert not torch.equal(result(augment, index, epoch=3), first)
    assert not torch.equal(result(replace(augment, seed=5), index), first)
    assert not torch.equal(augment(augment.crop(IMAGES[:8], 2, other), 2, other), first)


def test_defaults_depend_on_whether_images_were_files():
    index = torch.arange(COUNT)
    assert torch.equal(result(augmentation(), index), PLAIN.normalise(IMAGES))
    assert augmentation().describe() == "none"
    assert augmentation(files=True).describe() == "crop of 35% to 100%, flip 50%"
    assert augmentation(files=True, hflip=0.0, scale=(0.1, 0.5)).describe() == "crop of 10% to 50%"
    assert augmentation(auto_augment="rand-m9", color_jitter=0.4).describe() == "RandAugment rand-m9"  # as in timm


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("settings", [{"auto_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}], ids=str)
def test_timm_transforms_are_functions_of_seed_epoch_and_index_and_leave_generators_alone(settings):
    augment, image, before = augmentation(**settings), IMAGES[0], states()
    changed = [augment.transform(image, 2, index) for index in range(12)]
    assert states() == before
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert all(torch.equal(augment.transform(image, 2, index), changed[index]) for index in range(12))
    for other in (
        [augment.transform(image, 3, index) for index in range(12)],
        [replace(augment, seed=5).transform(image, 2, index) for index in range(12)],
        [image] * 12,
        changed[1:] + changed[:1],
    ):
        assert not all(map(torch.equal, other, changed))
    assert torch.equal(augmentation().transform(image, 2, 0), image)


def test_posterizing_to_no_bits_gives_black_whatever_the_version_of_pillow():
    image = v2.functional.to_pil_image(IMAGES[0])
    (policy,) = augmentation(auto_augment="rand-m10-inc1-p1")._policy.transforms
    (operation,) = (operation for operation in policy.ops if "Posterize" in operation.name)
    assert not np.asarray(operation(image)).any()


@pytest.mark.gpu
def test_a_gpu_does_the_same_and_is_never_waited_for():
    augment, index = augmentation(**EVERYTHING), torch.arange(COUNT)
    images = IMAGES.cuda()

    def on_gpu():
        return augment(augment.crop(images, 2, index), 2, index)

    on_gpu()  # constants are copied once
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = on_gpu()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = result(augment, index)
    assert torch.equal(augment.crop(images, 2, index).cpu(), augment.crop(IMAGES, 2, index))
    # the last bit of a sine or a logarithm may differ, and then a level
    assert ((found.cpu() - expected).abs() > 1e-4).float().mean() < 0.01


SCALE, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)


def boxes_of(count, height, width, scale=SCALE, ratio=RATIO, seed=1):
    draws = uniform(seed, torch.arange(count), CROP_DRAWS).tolist()
    return draws, [crop_box(row, scale, ratio, height, width) for row in draws]


@pytest.mark.parametrize("ratio", [RATIO, (1.0, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize("scale", [SCALE, (0.08, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(60, 80), (400, 20), (12, 9)])
def test_boxes_are_those_of_torchvision(height, width, scale, ratio):
    """Compared as distributions: torchvision draws from torch's generator."""
    ours = torch.tensor(boxes_of(2000, height, width, scale, ratio)[1]).double()
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(8, scale=scale, ratio=ratio), torch.empty(3, height, width)
    drawn = [crop.make_params([image]) for _ in range(2000)]
    theirs = torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in drawn]).double()
    for measure in (torch.Tensor.mean, torch.Tensor.std):
        torch.testing.assert_close(measure(ours, 0), measure(theirs, 0), atol=0.03 * max(height, width), rtol=0)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all()


@pytest.mark.parametrize("mode", INTERPOLATIONS)
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (20, 28, 32), (16, 16, 48)])
def test_a_batch_and_single_images_are_resampled_as_torchvision_does(mode, height, width, size):
    noise = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    images = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").to(torch.uint8)
    _, boxes = boxes_of(12, height, width, (0.1, 1.0))
    found = crop_batch(images, torch.tensor(boxes), size, mode)
    for image, box, ours in zip(images, boxes, found, strict=True):
        array = image.permute(1, 2, 0).numpy().copy()
        reference = V.resized_crop(Image.fromarray(array), *box, [size, size], v2.InterpolationMode(mode))
        expected = V.pil_to_tensor(reference).int()
        for result in (ours, crop_pixels(array, box, size, mode)):
            difference = (result - expected).abs()
            assert difference.max() <= 2
            assert difference.float().mean() < 0.15


def test_shifting_moves_down_and_right_and_repeats_the_border():
    images = torch.randint(256, (5, 2, 4, 6), dtype=torch.uint8)
    # With a reach of 2 there are five offsets, and the middle of each fifth of [0, 1) hits one.
    offsets = [(-2, 2), (-1, 1), (0, 0), (1, -1), (2, -2)]
    draws = torch.tensor([[(down + 2.5) / 5, (right + 2.5) / 5] for down, right in offsets])
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="replicate").byte()
    for image, wide, (down, right) in zip(shift_images(images, 2, draws), padded, offsets, strict=True):
        assert torch.equal(image, wide[:, 2 - down : 6 - down, 2 - right : 8 - right])


def erased_boxes(count, probability, height=32, width=32):
    draws = uniform(5, torch.arange(count), ERASE_DRAWS).tolist()
    return [erase_box(row, probability, height, width) for row in draws]


def test_rectangles_are_those_of_timm_in_number_size_and_shape():
    """Compared as distributions: timm draws from Python's generator."""
    count, side = 4000, 32
    ours = torch.tensor([box for box in erased_boxes(count, 0.4, side, side) if box]).double()
    random.seed(0)
    erasing, boxes = RandomErasing(0.4, mode="const", device="cpu"), []
    for _ in range(count):
        erased = erasing(torch.ones(1, side, side))[0] == 0
        if erased.any():
            rows, columns = erased.any(1).nonzero()[:, 0], erased.any(0).nonzero()[:, 0]
            boxes.append([int(rows[0]), int(columns[0]), len(rows), len(columns)])
    theirs = torch.tensor(boxes).double()
    assert abs(len(ours) - len(theirs)) < 0.03 * count
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.6, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.6, rtol=0)
    assert (ours[:, :2] >= 0).all()
    assert ((ours[:, :2] + ours[:, 2:]) <= side).all()


def test_only_the_rectangle_becomes_noise():
    images = torch.full((50, 3, 20, 24), 9.0)
    chosen = erased_boxes(50, 0.5, 20, 24)
    erased = images.clone()
    erase(erased, chosen, 1, torch.arange(50))
    inside = torch.zeros(50, 20, 24, dtype=torch.bool)
    for row, box in enumerate(chosen):
        top, left, tall, wide = box or (0, 0, 0, 0)
        inside[row, top : top + tall, left : left + wide] = True
    assert torch.equal((erased != images).all(1), inside)
    assert torch.equal((erased != images).any(1), inside)
    values = erased.movedim(1, -1)[inside]
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(1, abs=0.05)
