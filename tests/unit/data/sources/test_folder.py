import os
import tarfile
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

from pdvit.data.sources import run_name
from tests.errors import refused
from tests.unit.data.batches import keys, opened, tar_without_end, write_tree

VAL = ["val/ant/9.png", "val/bee/9.png"]
MANY = [f"{name}/{number:02}.png" for name in ("ant", "bee") for number in range(30)]


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_a_folder_of_class_folders_is_a_source(tmp_path, validation):
    files = ["train/žába/1.png", "train/žába/deep/δύο.PNG", "train/ant/3.jpg", f"{validation}/ant/4.png"]
    source = opened(root := write_tree(tmp_path / "zvířata 動物", [*files, f"{validation}/žába/5.png"]))
    assert (source.name, run_name(str(root), "paper")) == ("zvířata 動物", "zvířata-動物-paper")
    assert source.classes == ["ant", "žába"]
    assert [path.name for path in source.splits["train"].paths] == ["3.jpg", "1.png", "δύο.PNG"]
    assert source.splits["train"].labels.tolist() == [0, 1, 1]
    assert [path.name for path in source.splits["val"].paths] == ["4.png", "5.png"]
    assert set(source.splits) == {"train", "val"}
    assert source.final_split == "val"


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ([], "no class folders"),
        (["1.png", "2.png"], "(loose images: 2)"),
        (["images/train/1.png", "masks/train/1.png"], "classes of pixels"),
        (["leftImg8bit/train/a/1.png", "gtFine/train/a/1.png"], "classes of pixels"),
        (["ant/1.png", "bee/2.png"], "none can be held out"),
        (["pictures/ant/1.png"], "found: pictures"),
        (["train/1.png", "val/2.png"], "no class folders"),
        (["train/ant/1.png"], "no split 'val' (found: train)"),
        (["train/ant/1.png", "val/ant/2.png", "val/bee/3.png"], "class 'bee' has no images in train"),
        (["train/ant/1.png", "train/bee/2.png", "val/ant/3.png"], "class 'bee' has no images in val"),
        (["train/ant/1.png", "val/ant/2.png", "test/bee/3.png"], "class 'bee' has no images in train"),
        (["train/ant/1.png", "train/bee/2.txt", "val/ant/3.png"], "class 'bee' has no images in train"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path, tree, what):
    with refused(what):
        opened(write_tree(tmp_path, tree))


def test_the_fingerprint_is_a_hash_of_labels_and_names(tmp_path):
    source = opened(write_tree(tmp_path, ["train/ant/b.png", "train/ant/a/z.png", "train/bee/c.png", *VAL]))
    digest = sha256(np.array([0, 0, 1], dtype="<i8").tobytes() + b"z.png/b.png/c.png/").hexdigest()[:16]
    assert source.fingerprint()["train"] == {"images": 3, "hash": digest}
    assert source.fingerprint()["classes"] == 2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("prefix", ["", "train/"])
def test_without_validation_a_tenth_of_each_class_is_held_out(tmp_path, seed, prefix):
    extra = ["test/ant/1.png", "test/bee/1.png"] if prefix else []
    root = write_tree(tmp_path, [f"{prefix}{file}" for file in MANY] + extra)
    source = opened(root, split_seed=seed)
    train, val = (set(source.splits[split].paths) for split in ("train", "val"))
    assert not train & val
    assert {path.relative_to(root).as_posix().removeprefix(prefix) for path in train | val} == set(MANY)
    assert source.splits["val"].labels.bincount().tolist() == [3, 3]
    assert source.final_split == ("test" if prefix else "val")
    assert f"split_seed {seed}" in source.describe()
    again = opened(root, split_seed=seed)
    other = opened(root, split_seed=seed + 1)
    assert again.fingerprint() == source.fingerprint()
    assert other.fingerprint()["val"] != source.fingerprint()["val"]


def test_splits_of_other_names_are_named(tmp_path):
    root = write_tree(tmp_path, ["fit/ant/1.png", "check/ant/2.png", "val/ant/3.png"])
    source = opened(root, train_split="fit", val_split="check")
    assert [keys(source.splits[split]) for split in ("train", "val")] == [["1.png"], ["2.png"]]
    with refused("no split 'absent'"):
        opened(root, train_split="fit", val_split="absent")


def test_files_that_are_no_images_are_counted_and_named_and_hidden_ones_skipped(tmp_path):
    hidden = ["train/ant/.2.png", "train/ant/.thumbnails/3.png", "train/.cache/1.png", ".git/ant/1.png"]
    write_tree(tmp_path, ["train/ant/1.png", "val/ant/2.png", "train/ant/deep/._1.png", "train/loose.png", *hidden])
    for name in ("train/ant/notes\x1b[31m.txt", "val/ant/3.gif"):
        (tmp_path / name).write_bytes(b"GIF89a")
    source = opened(tmp_path)
    (note,) = source.notes
    assert note.startswith("7 files are not read (hidden")  # a hidden folder counts once; the one outside of the splits
    assert "\x1b" not in source.describe()  # a command to the terminal
    assert all(name in note for name in ("train/.cache", "train/ant/.2.png", "train/ant/.thumbnails", "deep/._1.png"))
    assert (source.classes, keys(source.splits["train"])) == (["ant"], ["1.png"])
    packed = opened(pack(tmp_path, tmp_path / "set.tar"))
    assert (packed.fingerprint(), packed.notes) == (source.fingerprint(), source.notes)


def test_repeated_members_mixed_suffixes_and_images_in_two_splits_are_named(tmp_path):
    write_tree(tmp_path / "set", ["train/ant/1.png", "train/ant/1.jpg", "train/bee/2.png", "val/ant/3.png"])
    (tmp_path / "set/val/bee").symlink_to(tmp_path / "set/train/bee")
    notes = opened(tmp_path / "set").describe()
    assert "same name but for the suffix: 1 (train/ant/1)" in notes
    assert "warning: images in two splits: 1 (" in notes
    with tarfile.open(pack(tmp_path / "set", tmp_path / "set.tar"), "a") as packed:
        for _ in range(2):
            packed.add(tmp_path / "set/val/ant/3.png", "val/bee/4.png")
    assert "the tar has twice, read as the last: 1 (val/bee/4.png)" in opened(tmp_path / "set.tar").describe()


def test_the_description_has_classes_counts_and_sizes(tmp_path):
    root = write_tree(tmp_path / "pets", ["train/ant/1.png", "val/ant/2.png"])
    assert opened(root).describe() == "pets: 1 classes, images: 1 train, 1 val; 4x4 pixels"
    Image.new("RGB", (30, 7)).save(root / "train/ant/4.png")
    (root / "train/ant/5.png").write_bytes(b"torn")
    assert "from 4x4 to 30x7 pixels" in opened(root).describe()


def test_links_to_class_folders_are_followed_and_deeper_ones_are_not(tmp_path):
    write_tree(tmp_path, ["elsewhere/1.png", "elsewhere/2.png", "set/train/bee/3.png", "set/val/bee/4.png"])
    for split in ("train", "val"):
        (tmp_path / "set" / split / "ant").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/train/bee/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/train/bee/4.png").symlink_to(tmp_path / "gone.png")  # an image that does not open
    source = opened(tmp_path / "set")
    assert keys(source.splits["train"]) == ["1.png", "2.png", "3.png", "4.png"]
    assert "1 file is not read" in source.describe()


def test_only_split_folders_are_walked(tmp_path, monkeypatch):
    """A disk may have folders beside them that nobody may read, such as lost+found."""
    root = write_tree(tmp_path, ["train/ant/1.png", "val/ant/2.png", "lost+found/3.png"])
    walked, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walked.append(os.path.basename(path)) or real(path))
    assert set(opened(root).splits) == {"train", "val"}
    assert "lost+found" not in walked


def pack(folder, file, top=""):
    """Pack the contents of a folder below a folder `top`."""
    with tarfile.open(file, "w") as packed:
        packed.add(folder, top.rstrip("/") or ".")
    return file


def pixels(split):
    return [np.asarray(split.open(index).convert("RGB")) for index in range(len(split))]


@pytest.mark.parametrize("top", ["", "pictures/", "a/b/"])
def test_an_archive_is_the_folder_that_was_packed(image_folder, tmp_path, top):
    packed = opened(pack(image_folder, tmp_path / "pictures.tar", top))
    plain = opened(image_folder)
    assert packed.classes == plain.classes
    assert packed.name == "pictures"
    assert packed.fingerprint() == plain.fingerprint()
    for name, split in plain.splits.items():
        place = packed.splits[name].name(0).removeprefix(str(tmp_path / "pictures.tar"))
        assert place == split.name(0).removeprefix(str(image_folder)).replace("/", f"/{top}", 1)
        assert torch.equal(packed.splits[name].labels, split.labels)
        assert all(map(np.array_equal, pixels(packed.splits[name]), pixels(split)))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, "members", "loop"])
def test_an_archive_that_is_cut_off_or_without_end_is_refused(image_folder, tmp_path, kept):
    file = pack(image_folder, tmp_path / "set.tar")
    content = file.read_bytes()
    with tarfile.open(file) as packed:
        last = packed.getmembers()[-1].offset  # a cut between two members is the end for Python's tarfile
    start = content[: int(len(content) * kept) if isinstance(kept, float) else last]
    file.write_bytes(start + tar_without_end("train/red/x.png") if kept == "loop" else start)
    with refused("can't be read", where=str(tmp_path)):
        opened(file)


def test_hard_links_in_a_tar_are_read_and_symbolic_ones_counted(image_folder, tmp_path):
    (image_folder / "train/red/hard.png").hardlink_to(image_folder / "train/red/0.png")
    plain = opened(image_folder)
    (image_folder / "train/red/soft.png").symlink_to("1.png")
    source = opened(pack(image_folder, tmp_path / "set.tar"))
    assert source.fingerprint() == plain.fingerprint()
    assert all(map(np.array_equal, pixels(source.splits["train"]), pixels(plain.splits["train"])))
    (note,) = (note for note in source.notes if "links" in note)
    assert "1 (train/red/soft.png)" in note
