import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pdvit.config.schema import DataConfig
from pdvit.data.sources import list_images, open_source, source_label
from pdvit.errors import UserError

SIZES = {"train": 1200, "val": 237, "test": 360}


def digits(seed=0):
    return open_source(DataConfig(source="digits", split_seed=seed))


def rows(splits):
    """Return every image of some splits as a row of numbers, in an order of its own."""
    images = torch.cat([split.images for split in splits]).flatten(1).numpy()
    return images[np.lexsort(images.T)]


def layout(root, tree):
    """Make an image file for each split/class/file name."""
    for path in tree:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    return root


def folder(root):
    return open_source(DataConfig(source=str(root)))


def test_digits_come_in_three_splits_of_known_size():
    source = digits()
    assert {name: len(split) for name, split in source.splits.items()} == SIZES
    assert source.classes == [str(digit) for digit in range(10)]
    assert source.final_split == "test"
    for split in source.splits.values():
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.images.dtype == torch.uint8


def test_digits_splits_share_no_image():
    originals = load_digits().data
    assert len(np.unique(originals, axis=0)) == len(originals)
    every = rows(digits().splits.values())
    assert len(np.unique(every, axis=0)) == len(originals)


def test_digits_are_the_originals_enlarged():
    originals = load_digits()
    every = torch.cat([split.images for split in digits().splits.values()])
    labels = torch.cat([split.labels for split in digits().splits.values()])
    assert labels.bincount().tolist() == np.bincount(originals.target).tolist()
    assert torch.equal(every[:, 0], every[:, 1])
    assert torch.equal(every[:, 0], every[:, 2])
    assert every.min() == 0
    # Enlarging four times keeps the mean of an image up to the border, and 16 becomes 255.
    means = np.sort(every[:, 0].float().mean((1, 2)).numpy())
    assert np.abs(means - np.sort(originals.images.mean((1, 2)) * 255 / 16)).max() < 3


def test_digits_splits_are_stratified():
    source = digits()
    share = np.bincount(load_digits().target) / 1797
    for name, size in SIZES.items():
        counts = source.splits[name].labels.bincount(minlength=10).numpy()
        assert np.abs(counts - share * size).max() <= 1


def test_the_split_seed_decides_what_is_held_out():
    assert np.array_equal(rows([digits(0).splits["test"]]), rows([digits(0).splits["test"]]))
    assert not np.array_equal(rows([digits(0).splits["test"]]), rows([digits(1).splits["test"]]))
    assert not np.array_equal(rows([digits(0).splits["val"]]), rows([digits(1).splits["val"]]))
    assert np.array_equal(rows(digits(0).splits.values()), rows(digits(1).splits.values()))


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_a_folder_of_class_folders_is_a_source(tmp_path, validation):
    files = ["train/bee/1.png", "train/bee/deep/2.PNG", "train/ant/3.jpg", f"{validation}/ant/4.png"]
    source = folder(layout(tmp_path / "insects", [*files, f"{validation}/bee/5.png"]))
    assert source.name == "insects"
    assert source.classes == ["ant", "bee"]
    assert [path.name for path in source.splits["train"].paths] == ["3.jpg", "1.png", "2.PNG"]
    assert source.splits["train"].labels.tolist() == [0, 1, 1]
    assert [path.name for path in source.splits["val"].paths] == ["4.png", "5.png"]
    assert set(source.splits) == {"train", "val"}
    assert source.final_split == "val"


def test_a_test_folder_is_the_final_split(tmp_path):
    source = folder(layout(tmp_path, ["train/ant/1.png", "val/ant/2.png", "test/ant/3.png"]))
    assert source.final_split == "test"
    assert [path.name for path in source.splits["test"].paths] == ["3.png"]


def test_a_test_folder_of_loose_images_is_no_split(tmp_path):
    assert set(folder(layout(tmp_path, ["train/a/1.png", "val/a/2.png", "test/3.png"])).splits) == {"train", "val"}


def test_names_may_be_in_any_script(tmp_path):
    root = layout(tmp_path / "zvířata 動物", ["train/žába/один.png", "val/žába/δύο.png"])
    source = folder(root)
    assert source.classes == ["žába"]
    assert source.splits["val"].paths[0].name == "δύο.png"
    assert source_label(DataConfig(source=str(root))) == "zvířata-動物"


def test_hidden_folders_and_other_files_are_passed_over(tmp_path):
    layout(tmp_path, ["train/ant/1.png", "val/ant/2.png", "train/.cache/3.png"])
    (tmp_path / "train/ant/notes.txt").write_text("not an image")
    (tmp_path / "train/README.md").write_text("not a class")
    source = folder(tmp_path)
    assert source.classes == ["ant"]
    assert len(source.splits["train"]) == 1


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ([], "no folder train/ (found: nothing)"),
        (["pictures/ant/1.png"], "found: pictures"),
        (["train/1.png", "val/ant/2.png"], "no class folders"),
        (["train/ant/1.png"], "no folder val/"),
        (["train/ant/1.png", "val/ant/2.png", "val/bee/3.png"], "class 'bee' of val/ is not in train/"),
        (["train/ant/1.png", "train/bee/2.png", "val/ant/3.png"], "class 'bee' has no images in val/"),
        (["train/ant/1.png", "val/ant/2.png", "test/bee/3.png"], "class 'bee' of test/ is not in train/"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path, tree, what):
    with pytest.raises(UserError) as caught:
        folder(layout(tmp_path, tree))
    assert what in caught.value.what


def test_a_class_without_images_is_refused(tmp_path):
    layout(tmp_path, ["train/ant/1.png", "val/ant/2.png"])
    (tmp_path / "train/bee").mkdir()
    with pytest.raises(UserError, match="class 'bee' has no images in train/"):
        folder(tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "no-such-source", "", "x" * 400])
def test_a_source_that_is_not_there_is_refused(source):
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(source=source))
    assert "--data" in caught.value.where


def test_a_misspelt_source_names_the_closest():
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(source="digit"))
    assert "'digits'" in caught.value.tip


def test_a_file_is_no_source(tmp_path):
    file = tmp_path / "images.zip"
    file.touch()
    with pytest.raises(UserError, match="no folder"):
        folder(file)


def test_the_list_of_images_is_in_order(tmp_path):
    layout(tmp_path, ["b.png", "a.jpeg", "c/d.webp"])
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.png", "d.webp"]


@pytest.mark.parametrize(("source", "label"), [("digits", "digits"), ("some/place/my set!", "my-set-")])
def test_a_label_is_fit_for_a_file_name(source, label):
    assert source_label(DataConfig(source=source)) == label


@pytest.mark.parametrize(("name", "first"), [("digits:0-4", 0), ("digits:5-9", 5)])
def test_a_half_of_the_digits_has_its_images_in_the_splits_of_the_whole(name, first):
    whole, half = (open_source(DataConfig(source=source)) for source in ("digits", name))
    assert half.classes == [str(digit) for digit in range(first, first + 5)]
    for split, part in half.splits.items():
        chosen = [n for n, label in enumerate(whole.splits[split].labels.tolist()) if first <= label < first + 5]
        assert torch.equal(part.images, whole.splits[split].images[chosen])
        assert torch.equal(part.labels + first, whole.splits[split].labels[chosen])
