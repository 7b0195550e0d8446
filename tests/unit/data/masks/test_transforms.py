import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
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

PREPROCESSING = Preprocessing(8, 1.0, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
PLAIN = SegmentConfig(jitter=(1.0, 1.0), max_share=1.0, photometric=False)


def pair(height, width, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([*range(classes), 255], np.uint8), (height, width))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), torch.from_numpy(mask)


def coordinates(height, width):
    """An image and a mask whose values are their row and column."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, rows * 0], 2)), torch.from_numpy(rows * np.uint8(16) + columns)


def transform(segment=PLAIN, crop=8, flip=0.0, seed=0):
    return TrainingTransform(segment, PREPROCESSING, crop, flip, seed)


@given(
    st.lists(st.sampled_from([0, 1, 2, 255]), min_size=1, max_size=40),
    st.sampled_from([0.25, 0.5, 0.75, 0.9]),
)
@settings(deadline=None)
def test_balanced_crops_are_those_of_mmsegmentation(values, limit):
    """Ignored pixels do not count; there are two classes or more, none of them with this fraction or more."""
    counts = {value: values.count(value) for value in set(values) - {255}}
    expected = len(counts) > 1 and max(counts.values()) / sum(counts.values()) < limit
    assert balanced(torch.tensor(values, dtype=torch.uint8)[None], limit) == expected


@pytest.mark.parametrize("limit", [0.75, 1.0])
def test_crops_equal_a_plain_loop(limit):
    mask = torch.zeros(40, 50, dtype=torch.uint8)
    mask[:, 30:] = 1
    for seed in range(40):
        torch.manual_seed(seed)
        found = draw_crop(mask, 16, limit)
        torch.manual_seed(seed)
        for tried in range(11):
            top, left = int(torch.randint(25, ())), int(torch.randint(35, ()))
            part = mask[top : top + 16, left : left + 16]
            if tried == 10 or limit == 1 or 0.25 < part.float().mean() < 0.75:
                break
        assert found == (top, left, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(5, 6), (8, 3), (9, 8), (8, 8), (4, 16)])
def test_image_and_mask_stay_aligned_and_are_padded_right_and_bottom(height, width):
    image, mask = transform()(coordinates(height, width), 0, 1)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[: min(8, height), : min(8, width)] = True
    assert torch.equal(mask != 254, inside)
    assert torch.equal((image[0] * 16 + image[1])[inside], mask[inside])
    images, targets = normalise_and_pad(image[None], mask[None], PREPROCESSING)
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert (images[0, :, ~inside] == 0).all()
    assert (targets[0][~inside] == 255).all()
    assert torch.equal(targets[0][inside], mask[inside].long())
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    torch.testing.assert_close(images[0][:, inside], ((image / 255 - mean) / std)[:, inside])


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (25, 25), (4, 90)])
def test_sizes_are_drawn_as_by_torchvision(height, width):
    segment = SegmentConfig(jitter=(0.5, 2.0), short_side=16)
    reference, sides = v2.RandomShortestSize(list(range(8, 33)), 4 * 32), set()
    for seed in range(120):
        torch.manual_seed(seed)
        size = transform(segment, 64).draw_size(height, width)
        torch.manual_seed(seed)
        expected = reference.make_params([torch.zeros(3, height, width)])["size"]
        assert tuple(size) == expected
        sides.add(min(size))
    assert (max(sides) > 28) == (width < 90)


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (10, 900), (1, 1)])
@pytest.mark.parametrize("side", [None, 16])
def test_a_thin_strip_keeps_a_pixel(size, side):
    """Its long side is limited, and the short one would be rounded down to 0."""
    for index in range(8):
        image, mask = transform(SegmentConfig(short_side=side), 32)(pair(*size), 0, index)
        assert (image.shape, mask.shape) == ((3, 32, 32), (32, 32))
        assert mask[0, 0] != 254
    scaled = EvaluationTransform(side, "bilinear")(pair(*size)[0])
    assert min(scaled.shape[1:]) >= 1
    assert max(scaled.shape[1:]) <= (max(size) if side is None else 4 * side)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_evaluation_sizes_are_torchvisions_except_for_thin_strips(height, width, side):
    image = Image.new("RGB", (width, height))
    assert EvaluationTransform(None, "nearest")(image).shape == (3, height, width)
    scaled = EvaluationTransform(side, "nearest")(image)
    expected = functional._geometry._compute_resized_output_size((height, width), [side], max_size=4 * side)
    assert scaled.shape[1:] == tuple(max(1, length) for length in expected)


def test_masks_are_scaled_by_the_nearest_pixel():
    segment = SegmentConfig(jitter=(0.3, 3.0), max_share=1.0, photometric=False)
    image, mask = pair(21, 17)
    mask[mask == 0] = 4
    mask[mask == 1] = 200  # a mean of neighbours would be none of these
    for index in range(30):
        assert set(transform(segment, 64)((image, mask), 0, index)[1].unique().tolist()) <= {2, 3, 4, 200, 254, 255}


def test_photometric_factors_are_drawn_for_half_of_the_images_from_their_whole_range():
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
    assert all(params["channel_permutation"] is None for params in drawn)
    mask = tv_tensors.Mask(torch.tensor([[1, 2]], dtype=torch.uint8))
    assert torch.equal(PhotometricDistort()(image, mask)[1], mask)


def test_a_draw_is_a_function_of_seed_epoch_and_index():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    made = [transform(SegmentConfig(), seed=seed)(pair(30, 40), *key) for seed, *key in keys]
    torch.rand(5)
    before = torch.get_rng_state()
    for (seed, *key), (image, mask) in zip(keys, made, strict=True):
        again = transform(SegmentConfig(), seed=seed)(pair(30, 40), *key)
        assert torch.equal(again[0], image)
        assert torch.equal(again[1], mask)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({image.numpy().tobytes() for image, _ in made}) == 4
