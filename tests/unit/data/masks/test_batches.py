from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.images import BadImages
from pdvit.data.loader import LoaderConfig
from pdvit.data.masks.batches import (
    HUE,
    PhotometricDistort,
    draw_crop,
    eval_batches,
    evaluation_pixels,
    train_batches,
    training_pair,
)
from pdvit.data.masks.folders import MaskFiles, open_masks
from pdvit.data.masks.table import ClassTable
from pdvit.data.preprocessing import Preprocessing
from tests.errors import refused
from tests.unit.data.batches import fill, same, write

CROP = 16
PREPROCESSING = Preprocessing(CROP, 1.0, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
LOADER = LoaderConfig(3, 5, 0, torch.device("cpu"), PREPROCESSING)
SEGMENT = SegmentConfig()
SCENES = open_masks(DataConfig(source="scenes"), SEGMENT).splits
PLAIN = SegmentConfig(jitter=(1.0, 1.0), max_share=1.0, photometric=False)


@pytest.fixture
def splits(camvid):
    return open_masks(DataConfig(source=str(camvid)), SEGMENT).splits


def take(split, count, start=0, loader=LOADER, segment=SEGMENT, crop=CROP, **more):
    with closing(train_batches(split, loader, segment, crop, start, **more)) as batches:
        return list(islice(batches, count))


def test_a_step_is_the_same_from_any_start_with_workers_and_over_ranks(splits):
    before = torch.get_rng_state()
    for split in (splits["train"], SCENES["val"].take(torch.arange(7))):
        whole = take(split, 8)
        assert same(take(split, 3, 5), whole[5:])
        assert same(take(split, 4, 1, replace(LOADER, workers=2)), whole[1:5])
        parts = [take(split, 3, loader=replace(LOADER, rank=rank, processes=2)) for rank in range(2)]
        for batch, first, second in zip(whole, *parts, strict=False):
            assert torch.equal(batch.images, torch.cat([first.images, second.images]))
            assert torch.equal(batch.targets, torch.cat([first.targets, second.targets]))
            assert set(batch.targets.unique().tolist()) <= {*range(11), 255}
    assert torch.equal(torch.get_rng_state(), before)


def test_scenes_are_mirrored_only_on_request():
    split = SCENES["train"].take(torch.arange(3))
    (batch,), (mirrored,) = take(split, 1, segment=PLAIN, crop=64), take(split, 1, segment=PLAIN, crop=64, hflip=1.0)
    assert torch.equal(batch.targets, torch.stack([split.mask(int(at)).long() for at in batch.index]))
    assert torch.equal(mirrored.targets, batch.targets.flip(-1))


def test_evaluation_yields_every_image_once_with_its_mask_unchanged(splits):
    split = splits["train"]
    batches = list(eval_batches(split, LOADER, SegmentConfig(short_side=10)))
    assert [batch.index.tolist() for batch in batches] == [[index] for index in range(7)]
    for index, batch in enumerate(batches):
        mask = split.mask(index).long()
        assert torch.equal(batch.targets, mask[None])
        height, width = batch.images.shape[2:]
        assert min(height, width) == 10
        assert height / width == pytest.approx(mask.shape[0] / mask.shape[1], rel=0.1)


@pytest.mark.parametrize(("processes", "bad"), [(2, True), (3, False), (9, True)])
def test_ranks_evaluate_every_image_once(splits, camvid, processes, bad):
    if bad:
        (camvid / "images/train/3.png").write_bytes(b"torn")
    seen, skipped = [], []
    for rank in range(processes):
        loader = replace(LOADER, rank=rank, processes=processes, bad=BadImages(skip=True))
        seen += [int(batch.index) for batch in eval_batches(splits["train"], loader, SEGMENT)]
        skipped += loader.bad.found
    assert seen == [index for index in range(7) if not bad or not splits["train"].name(index).endswith("3.png")]
    assert len(skipped) == bad


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_mask_is_an_error_even_if_bad_images_are_skipped(splits, camvid, workers):
    loader = replace(LOADER, bad=BadImages(skip=True), workers=workers)
    fill(camvid / "masks/train/2.png", 9)
    write(camvid / "masks/val/9.png", torch.zeros(3, 4, dtype=torch.uint8).numpy())
    outside = "masks/train/2.png (outside of the table of 3 classes: id 9"
    with refused("1 mask can't be used", outside, tip="--check-masks"):
        take(splits["train"], 3, loader=loader)
    with refused("1 mask can't be used", "it is 4x3, its image"):
        list(eval_batches(splits["val"], loader, SEGMENT))


def pair(height, width, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([*range(5), 255], np.uint8), (height, width))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), torch.from_numpy(mask)


def transform(pair, segment=SEGMENT, crop=8, seed=0, epoch=0, index=0):
    return training_pair(segment, replace(LOADER, seed=seed), crop, 0.0, pair, epoch, index)


@pytest.mark.parametrize("limit", [0.5, 0.75, 1.0])
def test_crops_are_balanced_as_in_mmsegmentation(limit):
    """Ignored pixels do not count; there are two classes or more, none of them with this fraction or more."""
    mask = torch.zeros(40, 50, dtype=torch.uint8)
    mask[:, 20:], mask[:, 30:], mask[25:] = 255, 1, 2
    tries = []
    for seed in range(40):
        torch.manual_seed(seed)
        found = draw_crop(mask, 16, limit)
        torch.manual_seed(seed)
        for tried in range(11):
            top, left = int(torch.randint(25, ())), int(torch.randint(35, ()))
            part = mask[top : top + 16, left : left + 16].flatten().tolist()
            counts = [part.count(value) for value in set(part) - {255}]
            if tried == 10 or limit == 1 or (len(counts) > 1 and max(counts) / sum(counts) < limit):
                break
        assert found == (top, left, 16, 16)
        tries.append(tried)
    assert (max(tries) > 0) == (limit < 1)


@pytest.mark.parametrize(("height", "width"), [(5, 6), (8, 3), (9, 8), (8, 8), (4, 16)])
def test_image_and_mask_stay_aligned_and_are_padded_right_and_bottom(tmp_path, height, width):
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    image = write(tmp_path / "image.png", np.stack([rows, columns, rows * 0], 2))
    table, mask = ClassTable.of_ids(dict.fromkeys(range(200), "")), write(tmp_path / "mask.png", rows * 16 + columns)
    split = MaskFiles([image], torch.zeros(1, dtype=torch.long), [mask], table)
    (batch,) = take(split, 1, loader=replace(LOADER, batch_size=1), segment=PLAIN, crop=8, hflip=0.0)
    images, targets = batch.images[0], batch.targets[0]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[: min(8, height), : min(8, width)] = True
    assert (batch.images.dtype, batch.targets.dtype) == (torch.float32, torch.int64)
    assert (images[:, ~inside] == 0).all()
    assert (targets[~inside] == 255).all()
    mean, std = (torch.tensor(values)[:, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    coordinates = (images[:, inside] * std + mean) * 255
    torch.testing.assert_close(coordinates[0] * 16 + coordinates[1], targets[inside].float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(coordinates[2], torch.zeros(len(coordinates[2])), rtol=0, atol=1e-4)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_evaluation_sizes_are_torchvisions_except_for_thin_strips(height, width, side):
    image = Image.new("RGB", (width, height))
    assert evaluation_pixels(image, None, "nearest").shape == (3, height, width)
    scaled = evaluation_pixels(image, side, "nearest")
    expected = functional._geometry._compute_resized_output_size((height, width), [side], max_size=4 * side)
    assert scaled.shape[1:] == tuple(max(1, length) for length in expected)


def test_masks_are_scaled_by_the_nearest_pixel():
    segment = SegmentConfig(jitter=(0.3, 3.0), max_share=1.0, photometric=False)
    image, mask = pair(21, 17)
    mask[mask == 0] = 4
    mask[mask == 1] = 200  # a mean of neighbours would be none of these
    for index in range(30):
        assert set(transform((image, mask), segment, 64, index=index)[1].unique().tolist()) <= {2, 3, 4, 200, 254, 255}


@pytest.mark.parametrize(("shape", "inside"), [((1, 700), np.s_[0]), ((900, 2), np.s_[:, 0])])
def test_a_thin_strip_keeps_a_pixel(shape, inside):
    image, mask = transform(pair(*shape), SegmentConfig(jitter=(0.5, 2.0)))
    assert image.shape == (3, 8, 8)
    assert (mask == 254).sum() == 8 * 7
    assert set(mask[inside].tolist()) <= {0, 1, 2, 3, 4, 255}


def test_photometric_factors_have_mmsegmentations_hue_and_channels_stay_in_order():
    image, mask = tv_tensors.Image(torch.zeros(3, 2, 2, dtype=torch.uint8)), tv_tensors.Mask(torch.tensor([[1, 2]]))
    torch.manual_seed(0)
    drawn = [PhotometricDistort(hue=HUE).make_params([image]) for _ in range(400)]
    hues = [params["hue_factor"] for params in drawn if params["hue_factor"] is not None]
    assert -0.1 <= min(hues) < -0.09
    assert 0.09 < max(hues) <= 0.1
    assert all(params["channel_permutation"] is None for params in drawn)
    assert torch.equal(PhotometricDistort(hue=HUE)(image, mask)[1], mask)
