from pathlib import Path

import numpy as np
import pytest
import torch

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.bad_images import BadMask
from pdvit.data.masks.check import check_masks
from pdvit.data.masks.sources import open_masks
from pdvit.errors import UserError


def opened(root):
    return open_masks(DataConfig(source=str(root)), SegmentConfig())


def check(root, workers=0, every=True, **more):
    return check_masks(opened(root), every, workers, lambda text: None, **more)


@pytest.fixture
def faulty(camvid, write, fill):
    fill(camvid / "masks/train/1.png", 4)
    write(camvid / "masks/train/2.png", np.zeros((5, 6), np.uint8))
    write(camvid / "masks/train/3.png", np.zeros((15, 17, 3), np.uint8))
    fill(camvid / "masks/train/4.png", 3)
    fill(camvid / "masks/val/8.png", 255)
    (camvid / "masks/test/11.png").write_bytes(b"torn")
    return camvid


def test_sound_masks_are_said(camvid):
    source = opened(camvid)
    checked = check(camvid)
    assert checked.notes == (*source.notes, "all masks are sound")
    assert checked.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_named_before_the_start(faulty, workers):
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="6 masks can't be used") as caught:
        check(faulty, workers)
    assert torch.equal(torch.get_rng_state(), before)
    for name, reason in (
        ("train/1.png", "id 4 is outside of the table of 3 classes"),
        ("train/2.png", "it is 6x5, its image 17x14"),
        ("train/3.png", "it is RGB, where ids are expected"),
        ("train/4.png", "all of its pixels are ignored"),
        ("val/8.png", "all of its pixels are ignored"),
        ("test/11.png", "not an image"),
    ):
        assert any(f"{name} ({reason}" in part for part in caught.value.where.split("; "))


def test_at_most_ten_are_named(camvid, write):
    for path in (camvid / "masks").rglob("*.png"):
        write(path, np.zeros((1, 1), np.uint8))
    with pytest.raises(UserError, match="12 masks") as caught:
        check(camvid)
    assert caught.value.where.count(".png") == 10
    assert "and 2 more" in caught.value.where


def test_classes_without_a_pixel_are_said(camvid):
    (camvid / "classes.tsv").write_text("0\tSky\n1\tRoad\n2\tCar\n3\tBus\n4\tRare\n")
    assert "1 of 5 classes are in no mask of val: Rare" in check(camvid).describe()


def test_processes_share_the_work(faulty):
    parts = []
    for rank in range(2):
        with pytest.raises(UserError):
            check(faulty, share=(rank, 2), gather=lambda seen: parts.append(seen) or [seen])
    first, second = parts[:3], parts[3:]
    assert [sorted({**one, **other}) for one, other in zip(first, second, strict=True)] == [
        list(range(7)),
        list(range(3)),
        list(range(2)),
    ]
    assert all(index % 2 == rank for rank, half in ((0, first), (1, second)) for seen in half for index in seen)
    assert isinstance(first[0][0], BadMask)


def test_a_bad_image_is_not_the_fault_of_its_mask(camvid):
    (camvid / "images/train/1.png").write_bytes(b"torn")
    assert "all masks are sound" in check(camvid).describe()


@pytest.mark.parametrize(("split", "index"), [("train", 0), ("val", 0), ("val", -1), ("test", 0), ("test", -1)])
def test_held_out_masks_and_the_first_to_learn_from_are_always_read(camvid, fill, write, split, index):
    held = opened(camvid).splits[split]
    mask = Path(held.mask_name(range(len(held))[index]))
    sound = mask.read_bytes()
    assert check(camvid, every=False).notes == opened(camvid).notes
    for spoil, reason in (
        (lambda: fill(mask, 4), "id 4 is outside of the table of 3 classes"),
        (lambda: write(mask, np.zeros((15, 17, 3), np.uint8)), "it is RGB, where ids are expected"),
        (lambda: write(mask, np.zeros((5, 6), np.uint8)), "it is 6x5, its image"),
    ):
        spoil()
        with pytest.raises(UserError, match="1 mask can't be used") as caught:
            check(camvid, every=False)
        assert f"{mask} ({reason}" in caught.value.where
        mask.write_bytes(sound)
    fill(mask, 3)  # it teaches nothing, and does no harm
    check(camvid, every=False)


def test_a_held_out_split_without_labels_is_refused_and_one_bad_mask_to_learn_from_waits(camvid, fill):
    fill(Path(opened(camvid).splits["train"].mask_name(1)), 4)
    check(camvid, every=False)
    for mask in (camvid / "masks/test").iterdir():
        fill(mask, 3)
    with pytest.raises(UserError, match="masks of test has a class"):
        check(camvid, every=False)


@pytest.mark.slow
def test_camvids_masks_are_sound(real_data):
    assert check(real_data / "camvid").notes[-1] == "all masks are sound"
