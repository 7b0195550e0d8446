import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.masks.batches import read_pairs
from pdvit.data.masks.folders import check_masks, open_masks
from tests.errors import refused
from tests.unit.data.batches import fill, write

# The ids that Cityscapes scores, from the benchmark's labels.py: road, sidewalk, building, ... motorcycle, bicycle.
CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
ADE = ["wall", "building", "sky", "floor"]
GREY = np.zeros((4, 4), np.uint8)


def opened(root, classes=None, **data):
    segment = SegmentConfig(classes=None if classes is None else str(classes))
    return open_masks(DataConfig(source=str(root), workers=0, **data), segment, lambda text: None)


def check(root, workers=0, every=True):
    return check_masks(opened(root), every, workers, lambda text: None)


def lengths(source):
    return {name: len(split) for name, split in source.splits.items()}


def test_images_and_masks_are_paired_and_read_through_the_table(camvid):
    write(camvid / "images/train/.hidden/1.png", GREY)
    write(camvid / "images/train/.2.png", GREY)
    source = opened(camvid)
    assert (source.classes, source.final_split) == (["Sky", "Road", "Car"], "test")
    assert lengths(source) == {"train": 7, "val": 3, "test": 2}
    assert "ignored in masks: 3" in source.describe()
    for role, split in source.splits.items():
        for index in range(len(split)):
            expected = torch.from_numpy(np.array(Image.open(camvid / "masks" / role / split.key(index).split("/")[1])))
            ((image, mask, _),) = read_pairs(lambda pair, *_: pair, split, 0, [index])
            assert torch.equal(mask, torch.where(expected == 3, 255, expected))
            assert (image.mode, image.size) == ("RGB", tuple(reversed(expected.shape)))
    part = pickle.loads(pickle.dumps(split)).take(torch.tensor([1]))
    assert (len(part), part.name(0), part.mask_name(0)) == (1, split.name(1), split.mask_name(1))
    assert torch.equal(part.mask(0), split.mask(1))
    assert part.hash() != split.hash()


def test_ade20ks_layout_is_recognized_by_its_name_or_its_list_of_objects(tmp_path, monkeypatch):
    ade, mask = tmp_path / "ADEChallengeData2016", np.arange(5, dtype=np.uint8)[None]
    for split, short, count in (("training", "train", 4), ("validation", "val", 2)):
        for number in range(1, count + 1):
            name = f"ADE_{short}_{number:08d}"
            write(ade / "images" / split / f"{name}.jpg", np.zeros((1, 5, 3), np.uint8))
            write(ade / "annotations" / split / f"{name}.png", mask)
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.2\t9\t1\twall", "2\t0.1\t6\t6\tbuilding, edifice", "3\t0\t1\t1\tsky"]
    (ade / "objectInfo150.txt").write_text("\n".join([*rows, "4\t0.1\t2\t2\tfloor, flooring"]) + "\n")
    for source in (opened(ade), opened(ade.parent)):
        assert (source.classes, lengths(source)) == (ADE, {"train": 4, "val": 2})
    assert source.splits["val"].mask(1).tolist() == [[255, 0, 1, 2, 3]]
    monkeypatch.chdir(ade)
    assert opened(".").classes == ADE
    (ade / "objectInfo150.txt").rename(tmp_path / "kept")
    with refused(where="objectInfo150"):
        opened(".")
    renamed = ade.rename(tmp_path / "mine")  # the user's own set may have these folders
    (renamed / "classes.tsv").write_text("0\tvoid\n" + "".join(f"{n}\tc{n}\n" for n in range(1, 5)))
    assert opened(renamed).classes == ["c1", "c2", "c3", "c4"]
    (tmp_path / "kept").rename(renamed / "objectInfo150.txt")
    assert opened(renamed).classes == ADE


def test_cityscapes_layout(tmp_path):
    values = np.array([[*range(34), 255]], np.uint8)
    for split, cities in (("train", ("aachen", "ulm")), ("val", ("lindau",)), ("test", ("berlin",))):
        for name in (f"{city}/{city}_000000_{frame:06d}" for city in cities for frame in range(2)):
            write(tmp_path / f"leftImg8bit/{split}/{name}_leftImg8bit.png", np.zeros((1, 35, 3), np.uint8))
            write(tmp_path / f"gtFine/{split}/{name}_gtFine_labelIds.png", values * (split != "test"))
            write(tmp_path / f"gtFine/{split}/{name}_gtFine_color.png", GREY)
    source = opened(tmp_path)
    assert lengths(source) == {"train": 4, "val": 2}
    assert "test is not used: it has no labels" in source.describe()
    assert (len(source.classes), source.classes[0], source.classes[-1]) == (19, "road", "bicycle")
    assert source.palette[0] == (128, 64, 128)
    expected = [CITYSCAPES.index(value) if value in CITYSCAPES else 255 for value in values[0]]
    for index in range(4):
        assert source.splits["train"].mask(index).tolist() == [expected]


def test_folders_without_splits_hold_out_a_tenth(camvid, tmp_path):
    root = tmp_path / "flat"
    for name in ("images", "masks"):
        (root / name / "deep").mkdir(parents=True)
        for file in (camvid / name).rglob("*.png"):
            shutil.copy(file, root / name / "deep" / file.name)
    shutil.copy(camvid / "classes.tsv", root / "classes.csv")
    source = opened(root)
    assert lengths(source) == {"train": 11, "val": 1}
    assert "val is 10% of the training images" in source.describe()
    train, val = ({split.name(index) for index in range(len(split))} for split in source.splits.values())
    assert len(train | val) == 12
    assert opened(root).fingerprint() == source.fingerprint() != opened(root, split_seed=3).fingerprint()


def test_without_a_table_the_ids_of_all_masks_are_the_classes(camvid):
    (camvid / "classes.tsv").unlink()
    fill(camvid / "masks/test/12.png", 9)
    fill(camvid / "masks/val/10.png", 255)
    source = opened(camvid)
    assert source.classes == ["0", "1", "2", "3", "9"]
    assert source.splits["test"].mask(1).unique().tolist() == [4]
    assert source.splits["val"].mask(0).unique().tolist() == [255]
    assert "a table (classes.tsv, --classes) gives them names" in source.describe()
    for file in (camvid / "masks").rglob("*.png"):
        image = Image.fromarray(np.asarray(Image.open(file)))
        image.putpalette([level for index in range(256) for level in (index, 7, 255 - index)])
        image.save(file)
    assert opened(camvid).palette == [(index, 7, 255 - index) for index in (0, 1, 2, 3, 9)]


def test_binary_masks_of_0_and_255_have_two_classes(camvid):
    (camvid / "classes.tsv").unlink()
    for file in (camvid / "masks").rglob("*.png"):
        write(file, np.where(np.asarray(Image.open(file)) > 1, 255, 0).astype(np.uint8))
    write(camvid / "images/val/._x.jpg", GREY)
    source = opened(camvid)
    assert (source.classes, source.splits["val"].mask(0).unique().tolist()) == (["0", "255"], [0, 1])
    assert "val: 1 file is not read (hidden" in source.describe()
    (camvid / "classes.tsv").write_text("0\t0\n255\t255\n7\trare\n")
    assert "1 of 3 classes are in no mask of val: rare" in check(camvid, every=False)
    (camvid / "images/train/1.png").write_bytes(b"torn")  # not a fault of its mask
    assert "all masks are sound" in check(camvid)


def one_id(camvid):
    for file in (camvid / "masks").rglob("*.png"):
        write(file, GREY + 5)
    (camvid / "classes.tsv").unlink()


def colours_without_table(camvid):
    write(camvid / "masks/val/8.png", np.zeros((4, 4, 3), np.uint8))
    (camvid / "classes.tsv").unlink()


def many_missing(camvid):
    for number in range(12):
        write(camvid / f"images/val/more{number:02}.png", GREY)


@pytest.mark.parametrize(
    ("spoil", "message", "place"),
    [
        (one_id, "have 1 ids", "--classes"),
        (colours_without_table, "1 mask can't be used", "8.png (it is RGB"),
        (many_missing, "images without a mask in masks/val: 12", "and 2 more"),
        (lambda root: shutil.copy(root / "masks/val/8.png", root / "masks/val/8.bmp"), "same name but", "val"),
        (lambda root: shutil.rmtree(root / "images/val") or (root / "images/val").mkdir(), "no images in", ""),
        (lambda root: shutil.rmtree(root / "masks"), "has no images/ and masks/", "--data"),
    ],
)
def test_folders_that_are_not_complete_are_refused(camvid, spoil, message, place):
    spoil(camvid)
    with refused(message, place) as caught:
        opened(camvid)
    assert caught.value.where.count(".png") <= 10


def test_other_names_and_files_without_counterpart(camvid, tmp_path):
    for name in ("images", "masks"):
        (camvid / name / "val").rename(camvid / name / "check")
    (camvid / "images/check/8.png").unlink()
    shutil.rmtree(camvid / "masks/test")
    (tmp_path / "mine.csv").write_text("id,name\n0,up\n1,down\n2,void\n3,ignore\n")
    source = opened(camvid, tmp_path / "mine.csv", val_split="check")
    assert (source.classes, lengths(source)) == (["up", "down"], {"train": 7, "val": 2})
    assert "test is not used" in source.describe()
    assert "masks without an image in images/check: 1" in source.describe()
    with refused("no split 'chekc'"):
        opened(camvid, val_split="chekc")
    with refused("there is no folder"):
        opened("torch/cifar100")


def test_a_fingerprint_depends_on_tables_and_files_but_not_on_places(camvid, tmp_path):
    ours = opened(camvid).fingerprint()
    moved = shutil.copytree(camvid, tmp_path / "elsewhere")
    assert opened(moved).fingerprint() == ours
    (moved / "classes.tsv").write_text("0\tSky\n2\tRoad\n1\tCar\n3\tUnlabelled\n")
    assert opened(moved).fingerprint() != ours
    shutil.copy(camvid / "classes.tsv", moved / "classes.tsv")
    for name in ("images", "masks"):
        (moved / name / "val/8.png").rename(moved / name / "val/other.png")
    assert opened(moved).fingerprint() != ours


@pytest.mark.parametrize("workers", [0, 2])
def test_the_check_names_every_fault(camvid, workers):
    fill(camvid / "masks/train/1.png", 4)
    write(camvid / "masks/train/2.png", np.zeros((5, 6), np.uint8))
    write(camvid / "masks/train/3.png", np.zeros((15, 17, 3), np.uint8))
    fill(camvid / "masks/train/4.png", 3)
    fill(camvid / "masks/val/8.png", 255)
    (camvid / "masks/test/11.png").write_bytes(b"torn")
    filters = list(warnings.filters)
    with refused("6 masks can't be used") as caught:
        check(camvid, workers)
    assert list(warnings.filters) == filters  # the threads change them
    for name, reason in (
        ("train/1.png", "outside of the table of 3 classes: id 4"),
        ("train/2.png", "it is 6x5, its image 17x14"),
        ("train/3.png", "it is RGB, where ids are expected"),
        ("train/4.png", "all of its pixels are ignored"),
        ("val/8.png", "all of its pixels are ignored"),
        ("test/11.png", "not an image"),
    ):
        assert f"{name} ({reason}" in caught.value.where


@pytest.mark.parametrize(("split", "index"), [("train", 0), ("val", -1), ("test", 0)])
def test_held_out_masks_and_the_first_training_mask_are_always_read(camvid, split, index):
    splits = opened(camvid).splits
    fill(Path(splits["train"].mask_name(1)), 4)  # met only in training
    mask = Path(splits[split].mask_name(range(len(splits[split]))[index]))
    fill(mask, 3)  # all ignored: it teaches nothing, and does no harm
    assert "all masks are sound" not in check(camvid, every=False)
    fill(mask, 4)
    with refused("1 mask can't be used", f"{mask} (outside of the table of 3 classes: id 4"):
        check(camvid, every=False)
    for other in (mask, *(camvid / "masks/val").iterdir()):
        fill(other, 3)
    with refused("masks of val has a class"):
        check(camvid, every=False)


@pytest.mark.slow
def test_the_real_packs(real_data):
    camvid = opened(real_data / "camvid")
    assert lengths(camvid) == {"train": 367, "val": 101, "test": 233}
    assert len(camvid.classes) == 11
    assert check(real_data / "camvid")[0] == "all masks are sound"
    ade = opened(real_data / "ade20k-sample")
    assert lengths(ade) == {"train": 3, "val": 3}
    assert (len(ade.classes), ade.classes[0], ade.classes[149]) == (150, "wall", "flag")
    pairs = [pair for split in ade.splits.values() for pair in read_pairs(lambda pair, *_: pair, split, 0, range(3))]
    assert all(image.size == mask.shape[::-1] for image, mask, _ in pairs)
