from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdvit.config.schema import AugmentConfig
from pdvit.data.augment.pipeline import Augmentation
from pdvit.data.preprocessing import Preprocessing

SIZE, COUNT = 16, 24
PLAIN = Preprocessing(SIZE, 1.0, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
EVERYTHING = {
    "scale": (0.4, 1.0),
    "shift": 2,
    "hflip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1-n3",
    "reprob": 0.5,
}
IMAGES = torch.randint(256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def augmentation(decoded=False, **settings):
    return Augmentation.of(AugmentConfig(**settings), decoded, PLAIN, seed=4)


def result(augment, index, epoch=2):
    return augment(augment.crop(IMAGES[index], epoch, index), epoch, index)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=9, unique=True), st.booleans())
def test_an_image_becomes_the_same_in_any_batch(index, jitter):
    more = {"auto_augment": "", "color_jitter": 0.4} if jitter else {}
    augment = augmentation(**EVERYTHING | more)
    whole = result(augment, torch.arange(COUNT))
    assert torch.equal(result(augment, torch.tensor(index)), whole[index])


@pytest.mark.parametrize(
    "changed", [{"scale": (0.4, 1.0)}, {"shift": 2}, {"hflip": 0.5}, {"auto_augment": "rand"}, {"color_jitter": 0.4}]
)
def test_draws_change_with_epoch_sample_and_seed(changed):
    augment = augmentation(**changed)
    index, other = torch.arange(8), torch.arange(8) + 8
    first = result(augment, index)
    assert torch.equal(result(augment, index), first)
    assert not torch.equal(result(augment, index, epoch=3), first)
    assert not torch.equal(result(replace(augment, seed=5), index), first)
    alike = augment(augment.crop(IMAGES[:8], 2, other), 2, other)
    assert not torch.equal(alike, first)


def test_the_process_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    result(augmentation(**EVERYTHING), torch.arange(COUNT))
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_stay_as_they_are_unless_asked():
    index = torch.arange(COUNT)
    assert torch.equal(result(augmentation(), index), PLAIN.normalise(IMAGES))
    assert augmentation().describe() == "none"
    assert torch.equal(result(augmentation(hflip=1.0), index), PLAIN.normalise(IMAGES.flip(3)))


def test_image_files_are_cropped_and_flipped_unless_asked_otherwise():
    assert augmentation(decoded=True).describe() == "crop of 35% to 100%, flip 50%"
    assert augmentation(decoded=True, hflip=0.0, scale=(0.1, 0.5)).describe() == "crop of 10% to 50%"


def test_half_of_the_images_are_flipped():
    index = torch.arange(COUNT)
    expected, found = PLAIN.normalise(IMAGES), result(augmentation(hflip=0.5), index)
    flipped = (found == expected.flip(3)).flatten(1).all(1)
    assert ((found == expected).flatten(1).all(1) ^ flipped).all()
    assert 6 <= flipped.sum() <= 18


def test_colour_jitter_is_off_with_a_policy_as_in_timm():
    both = augmentation(color_jitter=0.4, auto_augment="rand-m9")
    assert both.describe() == "RandAugment 9"
    assert torch.equal(result(both, torch.arange(4)), result(augmentation(auto_augment="rand-m9"), torch.arange(4)))


def test_erasing_comes_after_normalising():
    plain, erased = result(augmentation(), torch.arange(COUNT)), result(augmentation(reprob=1.0), torch.arange(COUNT))
    noise = erased[erased != plain]
    assert float(noise.mean()) == pytest.approx(0, abs=0.1)
    assert float(noise.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{}, {"auto_augment": "", "color_jitter": 0.4}])
def test_a_gpu_does_the_same_and_is_never_waited_for(more):
    augment, index = augmentation(**EVERYTHING | more), torch.arange(COUNT)
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
