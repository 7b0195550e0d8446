import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.masks.folders import cityscapes_table
from pdvit.data.masks.sources import open_masks
from pdvit.data.masks.split import MaskSplit, try_pair
from pdvit.data.sources import open_source
from pdvit.errors import UserError


def opened(root, classes=None, **data):
    segment = SegmentConfig(classes=None if classes is None else str(classes))
    return open_masks(DataConfig(source=str(root), workers=0, **data), segment, lambda text: None)


def lengths(source):
    return {name: len(split) for name, split in source.splits.items()}


@pytest.fixture
def stored(load):
    def read(root, name):
        (path,) = root.rglob(name)
        return torch.from_numpy(load(path)).long()

    return read


def test_camvids_layout(camvid, stored):
    source = opened(camvid)
    assert source.classes == ["Sky", "Road", "Car"]
    assert lengths(source) == {"train": 7, "val": 3, "test": 2}
    assert source.final_split == "test"
    assert "ignored in masks: 3" in source.describe()
    for split in source.splits.values():
        assert isinstance(split, MaskSplit)
        assert split.labels.tolist() == list(range(len(split)))
        for index in range(len(split)):
            expected = stored(camvid / "masks", split.key(index).split("/")[1])
            assert torch.equal(split.mask(index).long(), torch.where(expected == 3, 255, expected))
            with split.open(index) as image:
                assert image.size == tuple(reversed(expected.shape))


@pytest.mark.parametrize("above", [False, True])
def test_ade20ks_layout(ade, above, stored):
    source = opened(ade.parent if above else ade)
    assert source.classes == ["wall", "building", "sky", "floor"]
    assert lengths(source) == {"train": 4, "val": 2}
    expected = stored(ade, "ADE_val_00000002.png")
    assert torch.equal(source.splits["val"].mask(1).long(), torch.where(expected == 0, 255, expected - 1))
    assert source.splits["train"].name(0).endswith("images/training/ADE_train_00000001.jpg")


def test_ade20k_without_the_names_of_its_classes_is_refused(ade, monkeypatch):
    (ade / "objectInfo150.txt").unlink()
    with pytest.raises(UserError, match="objectInfo150"):
        opened(ade)
    monkeypatch.chdir(ade)
    with pytest.raises(UserError, match="objectInfo150"):
        opened(".")


@pytest.mark.parametrize("named", [False, True])
def test_a_set_of_ones_own_may_have_ade20ks_folders(ade, tmp_path, named):
    (ade / "objectInfo150.txt").unlink()
    root = ade.rename(tmp_path / "mine")
    (root / "classes.tsv").write_text("0\tvoid\n" + "".join(f"{n}\tc{n}\n" for n in range(1, 5)))
    if named:
        (root / "classes.tsv").rename(tmp_path / "classes.tsv")
    source = opened(root, tmp_path / "classes.tsv" if named else None)
    assert source.classes == ["c1", "c2", "c3", "c4"]
    assert lengths(source) == {"train": 4, "val": 2}


def test_ade20k_under_another_name_is_known_by_the_names_of_its_classes(ade, tmp_path, monkeypatch):
    monkeypatch.chdir(ade)
    assert opened(".").classes == ["wall", "building", "sky", "floor"]
    assert opened(ade.rename(tmp_path / "renamed")).classes == ["wall", "building", "sky", "floor"]


def test_cityscapes_layout(cityscapes, stored):
    source = opened(cityscapes)
    assert lengths(source) == {"train": 4, "val": 2}
    assert "test is not used: it has no labels" in source.describe()
    known = {kind.id: kind for kind in Cityscapes.classes}
    by_place = {kind.train_id: kind for kind in Cityscapes.classes if 0 <= kind.train_id < 255}
    assert source.classes == [by_place[place].name for place in range(19)]
    assert source.palette == [by_place[place].color for place in range(19)]
    split = source.splits["train"]
    for index in range(len(split)):
        name = split.mask_name(index).rpartition("/")[2]
        assert name.endswith("_gtFine_labelIds.png")
        expected = [[known[i].train_id if i != 255 else 255 for i in row] for row in stored(cityscapes, name).tolist()]
        assert split.mask(index).tolist() == expected


def test_the_19_ids_of_cityscapes_that_are_scored():
    """Written out from the benchmark's labels.py: road, sidewalk, building, ... motorcycle, bicycle."""
    scored = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    table = cityscapes_table()
    assert table.ids == {value: scored.index(value) if value in scored else 255 for value in (*range(34), 255)}
    ends = "road", "sidewalk", "motorcycle", "bicycle"
    assert (*table.names[:2], *table.names[-2:], len(table.names)) == (*ends, 19)


def test_a_flat_pair_of_folders_holds_out_a_tenth(camvid, tmp_path):
    root = tmp_path / "flat"
    for kind in ("images", "masks"):
        (root / kind / "deep").mkdir(parents=True)
        for file in (camvid / kind).rglob("*.png"):
            shutil.copy(file, root / kind / "deep" / file.name)
    shutil.copy(camvid / "classes.tsv", root / "classes.csv")
    source = opened(root)
    assert lengths(source) == {"train": 11, "val": 1}
    assert "val is 10% of the training images" in source.describe()
    names = [{split.name(index) for index in range(len(split))} for split in source.splits.values()]
    assert len(names[0] | names[1]) == 12
    assert opened(root).fingerprint() == source.fingerprint()
    assert opened(root, split_seed=3).fingerprint() != source.fingerprint()


def test_without_a_table_the_ids_of_all_masks_are_the_classes(camvid, fill):
    (camvid / "classes.tsv").unlink()
    fill(camvid / "masks/test/12.png", 9)
    fill(camvid / "masks/val/10.png", 255)
    source = opened(camvid)
    assert source.classes == ["0", "1", "2", "3", "9"]
    assert source.splits["test"].mask(1).unique().tolist() == [4]
    assert source.splits["val"].mask(0).unique().tolist() == [255]
    assert "a table (classes.tsv, --classes) gives them names" in source.describe()


def test_without_a_table_the_colours_are_those_of_a_palette(camvid, load):
    (camvid / "classes.tsv").unlink()
    for file in (camvid / "masks").rglob("*.png"):
        image = Image.fromarray(load(file))
        image.putpalette([level for index in range(256) for level in (index, 7, 255 - index)])
        image.save(file)
    assert opened(camvid).palette == [(index, 7, 255 - index) for index in range(4)]


def test_without_a_table_colours_are_refused_and_the_tip_says_how_to_write_one(camvid, write):
    (camvid / "classes.tsv").unlink()
    write(camvid / "masks/val/8.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="1 mask can't be used") as caught:
        opened(camvid)
    assert "8.png (it is RGB" in caught.value.where
    assert "#804080" in caught.value.tip


def test_masks_of_one_id_have_no_classes_to_tell(camvid, write):
    (camvid / "classes.tsv").unlink()
    for file in (camvid / "masks").rglob("*.png"):
        write(file, np.full((3, 3), 5, np.uint8))
    with pytest.raises(UserError, match="have 1 ids"):
        opened(camvid)


def test_a_table_that_is_named_goes_before_the_one_in_the_folder(camvid, tmp_path):
    (tmp_path / "mine.csv").write_text("id,name\n0,up\n1,down\n2,void\n3,ignore\n")
    assert opened(camvid, tmp_path / "mine.csv").classes == ["up", "down"]


@pytest.mark.parametrize("keep", [0, 3])
def test_images_without_a_mask_are_named(camvid, keep):
    for file in sorted((camvid / "masks/train").iterdir())[keep:]:
        file.unlink()
    with pytest.raises(UserError, match=f"{7 - keep} images have no mask in masks/train") as caught:
        opened(camvid)
    assert "images/train/7.png" in caught.value.where


def test_at_most_ten_missing_masks_are_named(camvid, write):
    for number in range(12):
        write(camvid / f"images/val/more{number:02}.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="12 images have no mask") as caught:
        opened(camvid)
    assert caught.value.where.count(".png") == 10
    assert "and 2 more" in caught.value.where


def test_masks_without_an_image_are_counted(camvid):
    (camvid / "images/val/8.png").unlink()
    assert "1 mask has no image in images/val" in opened(camvid).describe()


def test_two_masks_of_one_image_are_refused(camvid):
    shutil.copy(camvid / "masks/val/8.png", camvid / "masks/val/8.bmp")
    with pytest.raises(UserError, match="the same name but for the suffix"):
        opened(camvid)


def test_a_test_split_without_masks_is_not_used(camvid):
    shutil.rmtree(camvid / "masks/test")
    source = opened(camvid)
    assert lengths(source) == {"train": 7, "val": 3}
    assert "test is not used" in source.describe()


def test_splits_go_by_names_of_the_users(camvid):
    (camvid / "images/val").rename(camvid / "images/check")
    (camvid / "masks/val").rename(camvid / "masks/check")
    assert lengths(opened(camvid, val_split="check")) == {"train": 7, "val": 3, "test": 2}
    with pytest.raises(UserError, match="no images/chekc with masks"):
        opened(camvid, val_split="chekc")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "there is no folder"),
        ("digits", "classes of images, not of pixels"),
        ("torch/cifar100", "classes of images, not of pixels"),
    ],
)
def test_what_has_no_masks_is_refused(source, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(source)
    assert "scenes" in caught.value.tip


def test_a_folder_without_masks_is_refused(image_folder):
    with pytest.raises(UserError, match="has no images/ and masks/"):
        opened(image_folder)


def test_an_empty_split_is_refused(camvid):
    for file in (camvid / "images/train").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no images in images/train"):
        opened(camvid)


def test_digit_scenes_are_a_source_of_masks_alone(tmp_path):
    assert opened("scenes").name == "scenes"
    with pytest.raises(UserError, match="classes of pixels"):
        open_source(DataConfig(source="scenes"))
    with pytest.raises(UserError, match="their own classes"):
        opened("scenes", tmp_path / "classes.tsv")


def test_a_fingerprint_tells_tables_and_files_but_not_places(camvid, tmp_path):
    ours = opened(camvid).fingerprint()
    moved = shutil.copytree(camvid, tmp_path / "elsewhere")
    assert opened(moved).fingerprint() == ours
    (moved / "classes.tsv").write_text("0\tSky\n2\tRoad\n1\tCar\n3\tUnlabelled\n")
    assert opened(moved).fingerprint() != ours
    shutil.copy(camvid / "classes.tsv", moved / "classes.tsv")
    (moved / "masks/val/8.png").rename(moved / "masks/val/other.png")
    (moved / "images/val/8.png").rename(moved / "images/val/other.png")
    assert opened(moved).fingerprint() != ours


@pytest.mark.slow
def test_the_real_packs(real_data):
    camvid = opened(real_data / "camvid")
    assert lengths(camvid) == {"train": 367, "val": 101, "test": 233}
    assert len(camvid.classes) == 11
    assert "Unlabelled" not in camvid.classes
    masks = [camvid.splits["train"].mask(index) for index in range(0, 367, 5)]
    assert 0.02 < sum(float((mask == 255).float().mean()) for mask in masks) / len(masks) < 0.06  # 3.6 % of all
    ade = opened(real_data / "ade20k-sample")
    assert lengths(ade) == {"train": 3, "val": 3}
    assert (len(ade.classes), ade.classes[0], ade.classes[149]) == (150, "wall", "flag")
    pairs = [try_pair(split, index) for split in ade.splits.values() for index in range(3)]
    assert all(image.size == mask.shape[::-1] for image, mask in pairs)
