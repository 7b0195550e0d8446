import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from pdvit.config.schema import SegmentConfig
from pdvit.data.masks.transforms import (
    EvaluationTransform,
    PhotometricDistort,
    TrainingTransform,
    balanced,
    draw_crop,
    normalise_and_pad,
)
from pdvit.data.preprocessing import Preprocessing

HOW = Preprocessing(8, 1.0, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
PLAIN = SegmentConfig(jitter=(1.0, 1.0), max_share=1.0, photometric=False)


def pair(height, width, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([*range(classes), 255], np.uint8), (height, width))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), torch.from_numpy(mask)


def coordinates(height, width):
    """An image whose channels tell row and column, and a mask that tells them too: what belongs to what shows."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    image = Image.fromarray(np.stack([rows, columns, rows * 0], 2))
    return image, torch.from_numpy(rows * np.uint8(16) + columns)


def transform(segment=PLAIN, crop=8, flip=0.0, seed=0):
    return TrainingTransform(segment, HOW, crop, flip, seed)


@given(
    st.lists(st.sampled_from([0, 1, 2, 255]), min_size=1, max_size=40),
    st.sampled_from([0.25, 0.5, 0.75, 0.9]),
)
@settings(deadline=None)
def test_a_crop_fits_by_the_rule(values, most):
    """MMSegmentation's rule: pixels that are ignored do not count, two classes, none with the share or more."""
    counts = {value: values.count(value) for value in set(values) - {255}}
    expected = len(counts) > 1 and max(counts.values()) / sum(counts.values()) < most
    mask = torch.tensor(values, dtype=torch.uint8)[None]
    assert balanced(mask, most) == expected


@pytest.mark.parametrize("most", [0.75, 1.0])
def test_crops_equal_a_plain_loop(most):
    mask = torch.zeros(40, 50, dtype=torch.uint8)
    mask[:, 30:] = 1
    for seed in range(40):
        torch.manual_seed(seed)
        found = draw_crop(mask, 16, most)
        torch.manual_seed(seed)
        for tried in range(11):
            top, left = int(torch.randint(25, ())), int(torch.randint(35, ()))
            part = mask[top : top + 16, left : left + 16]
            if tried == 10 or most == 1 or 0.25 < part.float().mean() < 0.75:
                break
        assert found == (top, left, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(5, 6), (8, 3), (9, 8), (8, 8), (15, 16), (4, 16)])
def test_image_and_mask_stay_together_and_are_padded_right_and_bottom(height, width):
    image, mask = transform()(coordinates(height, width), 0, 1)
    assert image.shape == (3, 8, 8)
    assert mask.shape == (8, 8)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[: min(8, height), : min(8, width)] = True
    assert torch.equal(mask != 254, inside)
    assert torch.equal((image[0] * 16 + image[1])[inside], mask[inside])


def test_after_normalising_the_image_is_0_and_the_mask_255_beyond_the_end():
    image, mask = transform()(pair(5, 6), 0, 1)
    images, targets = normalise_and_pad(image[None], mask[None], HOW)
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert (images[:, :, 5:] == 0).all()
    assert (images[:, :, :, 6:] == 0).all()
    assert (targets[:, 5:] == 255).all()
    assert (targets[:, :, 6:] == 255).all()
    assert targets[:, :5, :6].tolist() == [pair(5, 6)[1].tolist()]
    mean, std = torch.tensor(HOW.mean)[:, None, None], torch.tensor(HOW.std)[:, None, None]
    expected = (functional.pil_to_tensor(pair(5, 6)[0]) / 255 - mean) / std
    torch.testing.assert_close(images[0, :, :5, :6], expected)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (25, 25)])
def test_the_short_side_is_scaled_whatever_the_orientation(height, width):
    segment = SegmentConfig(jitter=(0.5, 2.0), short_side=16, photometric=False)
    jitter = transform(segment, 64).jitter(min(height, width))
    sides = set()
    for seed in range(120):
        torch.manual_seed(seed)
        image, mask = jitter(
            tv_tensors.Image(torch.zeros(3, height, width)), tv_tensors.Mask(torch.zeros(height, width))
        )
        assert image.shape[1:] == mask.shape
        assert image.shape[1] / image.shape[2] == pytest.approx(height / width, rel=0.13)
        sides.add(min(mask.shape))
    assert min(sides) in (7, 8)  # torchvision rounds down
    assert max(sides) in (31, 32)


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (10, 900), (1, 1)])
@pytest.mark.parametrize("side", [None, 16])
def test_a_thin_strip_keeps_a_pixel(size, side):
    """Its long side is limited, and what that leaves of the short one would be rounded down to nothing."""
    segment = SegmentConfig(short_side=side)
    for index in range(8):
        image, mask = transform(segment, 32)(pair(*size), 0, index)
        assert (image.shape, mask.shape) == ((3, 32, 32), (32, 32))
        assert mask[0, 0] != 254
    seen = EvaluationTransform(side, "bilinear")(pair(*size)[0])
    assert min(seen.shape[1:]) >= 1
    assert max(seen.shape[1:]) <= (max(size) if side is None else 4 * side)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_evaluation_sizes_are_torchvisions_but_for_thin_strips(height, width, side):
    seen = EvaluationTransform(side, "nearest")(Image.new("RGB", (width, height)))
    expected = functional._geometry._compute_resized_output_size((height, width), [side], max_size=4 * side)
    assert seen.shape[1:] == tuple(max(1, length) for length in expected)


def test_masks_are_scaled_by_the_nearest_pixel():
    segment = SegmentConfig(jitter=(0.3, 3.0), max_share=1.0, photometric=False)
    image, mask = pair(21, 17)
    mask[mask == 0] = 4
    mask[mask == 1] = 200  # a mean of neighbours would be none of these
    for index in range(30):
        assert set(transform(segment, 64)((image, mask), 0, index)[1].unique().tolist()) <= {2, 3, 4, 200, 254, 255}


def test_a_flip_mirrors_both():
    plain, mirrored = transform()(coordinates(8, 8), 0, 0), transform(flip=1.0)(coordinates(8, 8), 0, 0)
    assert torch.equal(mirrored[0], plain[0].flip(-1))
    assert torch.equal(mirrored[1], plain[1].flip(-1))


def test_photometric_distortion_keeps_the_order_of_channels_and_the_mask():
    image = tv_tensors.Image(torch.tensor([200, 120, 40], dtype=torch.uint8)[:, None, None].expand(3, 2, 2))
    hues, orders = [], []
    for seed in range(120):
        torch.manual_seed(seed)
        params = PhotometricDistort().make_params([image])
        assert params["channel_permutation"] is None
        hues.append(params["hue_factor"])
        only_light = {**params, "hue_factor": None}
        orders.append(PhotometricDistort().transform(image, only_light)[:, 0, 0].int().tolist())
    drawn = [hue for hue in hues if hue is not None]
    assert max(map(abs, drawn)) <= 0.1
    assert max(map(abs, drawn)) > 0.08  # MMSegmentation: 18 of 180 degrees, where torchvision has half of it
    assert all(red >= green >= blue for red, green, blue in orders)
    mask = tv_tensors.Mask(torch.tensor([[1, 2]], dtype=torch.uint8))
    assert torch.equal(PhotometricDistort()(image, mask)[1], mask)


def test_each_photometric_factor_is_drawn_for_half_of_the_images_from_its_whole_range():
    image = tv_tensors.Image(torch.zeros(3, 2, 2, dtype=torch.uint8))
    torch.manual_seed(0)
    drawn = [PhotometricDistort().make_params([image]) for _ in range(400)]
    ranges = {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.1, 0.1)}
    for name, (least, most) in ranges.items():
        factors = [params[f"{name}_factor"] for params in drawn if params[f"{name}_factor"] is not None]
        assert 0.4 < len(factors) / len(drawn) < 0.6
        edge = (most - least) / 20
        assert least <= min(factors) < least + edge, name
        assert most - edge < max(factors) <= most, name
    assert 0.4 < sum(params["contrast_before"] for params in drawn) / len(drawn) < 0.6


def test_a_draw_is_a_function_of_seed_epoch_and_index():
    segment = SegmentConfig()
    made = {
        key: transform(segment, seed=key[0])(pair(30, 40), *key[1:])
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    torch.rand(5)
    before = torch.get_rng_state()
    for key, (image, mask) in made.items():
        again = transform(segment, seed=key[0])(pair(30, 40), *key[1:])
        assert torch.equal(again[0], image)
        assert torch.equal(again[1], mask)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({image.numpy().tobytes() for image, _ in made.values()}) == 4


@pytest.mark.parametrize(
    ("size", "expected"), [((30, 20), (24, 16)), ((20, 30), (16, 24)), ((16, 200), (5, 64)), ((8, 8), (16, 16))]
)
def test_evaluation_scales_the_short_side_unless_the_long_one_is_above_four_times(size, expected):
    image, _ = pair(*size)
    scaled = EvaluationTransform(16, "bilinear")(image)
    assert (scaled.shape, scaled.dtype) == ((3, *expected), torch.uint8)
    assert torch.equal(EvaluationTransform(None, "bilinear")(image), functional.pil_to_tensor(image))
