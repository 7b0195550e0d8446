from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.images import BadImages
from pdvit.data.loader import LoaderConfig
from pdvit.data.masks.batches import eval_batches, train_batches
from pdvit.data.masks.folders import open_masks
from pdvit.data.preprocessing import Preprocessing
from pdvit.errors import UserError

CROP = 16
LOADER = LoaderConfig(3, 5, 0, torch.device("cpu"), Preprocessing(CROP, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))
SEGMENT = SegmentConfig()
SCENES = open_masks(DataConfig(source="scenes"), SEGMENT).splits


@pytest.fixture
def splits(camvid):
    return open_masks(DataConfig(source=str(camvid)), SEGMENT).splits


def take(split, count, start=0, loader=LOADER, segment=SEGMENT, crop=CROP, **more):
    with closing(train_batches(split, loader, segment, crop, start, **more)) as batches:
        return list(islice(batches, count))


def same(ours, theirs):
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=True) for name in a.tensors()]
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_training_batch_has_normalized_images_and_a_class_for_every_pixel(splits):
    before = torch.get_rng_state()
    for batch in take(splits["train"], 4):
        assert (batch.images.shape, batch.images.dtype) == ((3, 3, CROP, CROP), torch.float32)
        assert (batch.targets.shape, batch.targets.dtype) == ((3, CROP, CROP), torch.int64)
        assert set(batch.targets.unique().tolist()) <= {0, 1, 2, 255}
        assert batch.images.abs().max() <= 2
        assert len(set(batch.index.tolist())) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_is_the_same_from_any_start_with_workers_and_over_ranks(splits):
    for split in (splits["train"], SCENES["val"].take(torch.arange(7))):
        whole = take(split, 8)
        assert same(take(split, 3, 5), whole[5:])
        assert same(take(split, 4, 1, replace(LOADER, workers=2)), whole[1:5])
        parts = [take(split, 3, loader=replace(LOADER, rank=rank, processes=2)) for rank in range(2)]
        for batch, first, second in zip(whole, *parts, strict=False):
            assert torch.equal(batch.images, torch.cat([first.images, second.images]))
            assert torch.equal(batch.targets, torch.cat([first.targets, second.targets]))


def test_scenes_are_mirrored_only_on_request():
    still = SegmentConfig(jitter=(1.0, 1.0), max_share=1.0, photometric=False)
    split = SCENES["train"].take(torch.arange(3))
    (batch,), (mirrored,) = take(split, 1, segment=still, crop=64), take(split, 1, segment=still, crop=64, hflip=1.0)
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


@pytest.mark.parametrize("processes", [2, 3, 9])
@pytest.mark.parametrize("bad", [False, True])
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
def test_a_bad_mask_is_an_error_even_if_bad_images_are_skipped(splits, camvid, write, fill, workers):
    loader = replace(LOADER, bad=BadImages(skip=True), workers=workers)
    fill(camvid / "masks/train/2.png", 9)
    write(camvid / "masks/val/9.png", torch.zeros(3, 4, dtype=torch.uint8).numpy())
    with pytest.raises(UserError, match="1 mask can't be used") as caught:
        take(splits["train"], 3, loader=loader)
    assert "masks/train/2.png (outside of the table of 3 classes: id 9" in caught.value.where
    assert "--check-masks" in caught.value.tip
    with pytest.raises(UserError, match="1 mask can't be used") as caught:
        list(eval_batches(splits["val"], loader, SEGMENT))
    assert "it is 4x3, its image" in caught.value.where


def test_a_bad_image_is_an_error_or_replaced(splits, camvid):
    (camvid / "images/train/3.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="1 image does not decode"):
        take(splits["train"], 3)
    bad = BadImages(skip=True)
    batches = take(splits["train"], 4, loader=replace(LOADER, bad=bad))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    assert sum(int(batch.replaced.sum()) for batch in batches) > 0
    assert [name.rpartition("/")[2] for name in bad.found] == ["3.png"]


@pytest.mark.slow
def test_camvid_makes_batches(real_data):
    splits = open_masks(DataConfig(source=str(real_data / "camvid")), SEGMENT).splits
    segment = SegmentConfig(short_side=180)
    for batch in take(splits["train"], 5, loader=replace(LOADER, workers=2), segment=segment, crop=128):
        assert set(batch.targets.unique().tolist()) <= {*range(11), 255}
    shapes = {batch.images.shape[2:] for batch in eval_batches(splits["val"], LOADER, segment)}
    assert shapes == {(180, 240)}
