from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.bad_images import BadImages
from pdvit.data.loader import LoaderConfig
from pdvit.data.masks.batches import eval_batches, train_batches
from pdvit.data.masks.folders import open_masks
from pdvit.data.preprocessing import Preprocessing
from pdvit.errors import UserError

CROP = 16
HOW = LoaderConfig(3, 5, 0, torch.device("cpu"), Preprocessing(CROP, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))
SEGMENT = SegmentConfig()
SCENES = open_masks(DataConfig(source="scenes"), SEGMENT).splits


@pytest.fixture
def splits(camvid):
    return open_masks(DataConfig(source=str(camvid)), SEGMENT).splits


def take(split, count, start=0, how=HOW, segment=SEGMENT, **more):
    with closing(train_batches(split, how, segment, CROP, start, **more)) as batches:
        return list(islice(batches, count))


def same(ours, theirs):
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=True) for name in a.tensors()]
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_training_batch_is_normalised_images_and_a_class_for_every_pixel(splits):
    for batch in take(splits["train"], 4):
        assert (batch.images.shape, batch.images.dtype) == ((3, 3, CROP, CROP), torch.float32)
        assert (batch.targets.shape, batch.targets.dtype) == ((3, CROP, CROP), torch.int64)
        assert set(batch.targets.unique().tolist()) <= {0, 1, 2, 255}
        assert batch.images.abs().max() <= 2
        assert len(set(batch.index.tolist())) == 3


@pytest.mark.parametrize("start", [1, 2, 5])
def test_starting_at_a_step_equals_getting_there(splits, start):
    assert same(take(splits["train"], 3, start), take(splits["train"], start + 3)[start:])


def test_worker_processes_change_nothing(splits):
    for split in (splits["train"], SCENES["val"].take(torch.arange(5))):
        assert same(take(split, 4, 1), take(split, 4, 1, replace(HOW, workers=2)))


def test_processes_share_a_step(splits):
    whole = take(splits["train"], 3)
    parts = [take(splits["train"], 3, how=replace(HOW, rank=rank, processes=2)) for rank in range(2)]
    for batch, one, other in zip(whole, *parts, strict=True):
        assert torch.equal(batch.images, torch.cat([one.images, other.images]))
        assert torch.equal(batch.targets, torch.cat([one.targets, other.targets]))


def test_loading_leaves_the_process_generator_alone(splits):
    before = torch.get_rng_state()
    take(splits["train"], 2)
    list(eval_batches(splits["val"], HOW, SEGMENT))
    assert torch.equal(torch.get_rng_state(), before)


def test_scenes_are_not_mirrored_unless_asked():
    still = SegmentConfig(jitter=(1.0, 1.0), max_share=1.0, photometric=False)
    split = SCENES["train"].take(torch.arange(3))
    how = replace(HOW, batch_size=3)
    with closing(train_batches(split, how, still, 64, 0)) as batches:
        batch = next(batches)
    assert torch.equal(batch.targets, torch.stack([split.mask(int(at)).long() for at in batch.index]))
    with closing(train_batches(split, how, still, 64, 0, hflip=1.0)) as batches:
        assert torch.equal(next(batches).targets, batch.targets.flip(-1))


def test_evaluation_gives_every_image_once_with_its_mask_as_it_is(splits):
    split = splits["train"]
    batches = list(eval_batches(split, HOW, SegmentConfig(short_side=10)))
    assert [batch.index.tolist() for batch in batches] == [[index] for index in range(7)]
    for index, batch in enumerate(batches):
        mask = split.mask(index).long()
        assert torch.equal(batch.targets, mask[None])
        height, width = batch.images.shape[2:]
        assert min(height, width) == 10
        assert height / width == pytest.approx(mask.shape[0] / mask.shape[1], rel=0.1)


@pytest.mark.parametrize("processes", [2, 3, 5, 9])
def test_processes_take_every_image_once(splits, processes):
    seen, pixels = [], 0
    for rank in range(processes):
        batches = list(eval_batches(splits["train"], replace(HOW, rank=rank, processes=processes), SEGMENT))
        seen += [int(batch.index) for batch in batches]
        pixels += sum(int((batch.targets != 255).sum()) for batch in batches)
    assert seen == list(range(7))
    alone = eval_batches(splits["train"], HOW, SEGMENT)
    assert pixels == sum(int((batch.targets != 255).sum()) for batch in alone)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_mask_is_an_error_even_if_bad_images_are_skipped(splits, camvid, write, fill, workers):
    how = replace(HOW, bad=BadImages(skip=True), workers=workers)
    fill(camvid / "masks/train/2.png", 9)
    write(camvid / "masks/val/9.png", torch.zeros(3, 4, dtype=torch.uint8).numpy())
    with pytest.raises(UserError, match="1 mask can't be used") as caught:
        take(splits["train"], 3, how=how)
    assert "masks/train/2.png (outside of the table of 3 classes: id 9" in caught.value.where
    assert "--check-masks" in caught.value.tip
    with pytest.raises(UserError, match="1 mask can't be used") as caught:
        list(eval_batches(splits["val"], how, SEGMENT))
    assert "it is 4x3, its image" in caught.value.where


def test_a_bad_image_is_refused_or_another_takes_its_place(splits, camvid):
    (camvid / "images/train/3.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="1 image does not decode"):
        take(splits["train"], 3)
    bad = BadImages(skip=True)
    batches = take(splits["train"], 4, how=replace(HOW, bad=bad))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    assert sum(int(batch.replaced.sum()) for batch in batches) > 0
    assert [name.rpartition("/")[2] for name in bad.found] == ["3.png"]
    left = list(eval_batches(splits["train"], replace(HOW, bad=BadImages(skip=True)), SEGMENT))
    assert len(left) == 6


@pytest.mark.slow
def test_camvid_makes_batches(real_data):
    splits = open_masks(DataConfig(source=str(real_data / "camvid")), SEGMENT).splits
    segment = SegmentConfig(short_side=180)
    with closing(train_batches(splits["train"], replace(HOW, workers=2), segment, 128, 0)) as batches:
        for batch in islice(batches, 5):
            assert set(batch.targets.unique().tolist()) <= {*range(11), 255}
    shapes = {batch.images.shape[2:] for batch in eval_batches(splits["val"], HOW, segment)}
    assert shapes == {(180, 240)}
