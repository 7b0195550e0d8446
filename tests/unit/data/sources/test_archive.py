import io
import pickle
import shutil
import tarfile
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

from pdvit.config.schema import DataConfig
from pdvit.data.bad_images import BadImage
from pdvit.data.preprocessing import try_read
from pdvit.data.sources import open_source, source_label
from pdvit.errors import UserError

FORMS = ["tar", "tar.gz", "tar.xz", "tar.bz2", "zip"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(path, **options):
    said = []
    return open_source(DataConfig(source=str(path), **options), said.append), said


def pack(folder, file, top=""):
    """Pack a folder's contents, below a folder `top`, as a user would."""
    form = file.name.partition(".")[2]
    if form == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(folder.rglob("*")):
                packed.write(path, f"{top}{path.relative_to(folder)}")
    else:
        mode = {"tar": "w"}.get(form, f"w:{form[4:]}")
        with tarfile.open(file, mode) as packed:
            packed.add(folder, top.rstrip("/") or ".")
    return file


def pixels(split):
    return [np.asarray(split.open(index).convert("RGB")) for index in range(len(split))]


@pytest.mark.parametrize("top", ["", "pictures/", "a/b/"])
@pytest.mark.parametrize("form", FORMS)
def test_an_archive_is_the_folder_that_was_packed(image_folder, tmp_path, form, top):
    packed, _ = opened(pack(image_folder, tmp_path / f"pictures.{form}", top))
    plain, _ = opened(image_folder)
    assert packed.classes == plain.classes
    assert packed.name == "pictures"
    assert packed.fingerprint() == plain.fingerprint()
    for name, split in plain.splits.items():
        assert torch.equal(packed.splits[name].labels, split.labels)
        assert all(map(np.array_equal, pixels(packed.splits[name]), pixels(split)))


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_an_archive_of_classes_alone_is_divided(image_folder, tmp_path, form):
    packed, _ = opened(pack(image_folder / "train", tmp_path / f"set.{form}"))
    assert {name: len(split) for name, split in packed.splits.items()} == {"train": 21, "val": 3}


def test_a_compressed_tar_is_unpacked_once_and_said(image_folder, tmp_path, cache):
    file = pack(image_folder, tmp_path / "set.tar.gz")
    _, first = opened(file)
    assert str(cache) in " ".join(first)
    copies = sorted(cache.glob("*.tar"))
    assert len(copies) == 1
    made = copies[0].stat().st_mtime_ns
    _, second = opened(file)
    assert not any("copying" in line for line in second)
    assert copies[0].stat().st_mtime_ns == made
    assert not list(cache.glob("*.part"))


def test_a_changed_archive_is_unpacked_again(image_folder, tmp_path):
    file = pack(image_folder, tmp_path / "set.tar.gz")
    opened(file)
    (image_folder / "train/red/new.png").write_bytes((image_folder / "train/red/0.png").read_bytes())
    source, _ = opened(pack(image_folder, file))
    assert len(source.splits["train"]) == 25


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_an_archive_that_is_cut_off_is_refused(image_folder, tmp_path, cache, form, kept):
    file = pack(image_folder, tmp_path / f"set.{form}")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError) as caught:
        opened(file)
    assert "can't be read" in caught.value.what
    assert str(tmp_path) in caught.value.where
    assert not list(cache.glob("*.part"))


def test_a_tar_that_is_cut_off_between_two_members_is_refused(image_folder, tmp_path):
    """Python's tarfile takes that for its end."""
    file = pack(image_folder, tmp_path / "set.tar")
    with tarfile.open(file) as packed:
        last = packed.getmembers()[-1].offset
    file.write_bytes(file.read_bytes()[:last])
    with pytest.raises(UserError, match="last block"):
        opened(file)


def test_links_in_a_tar_are_followed(image_folder, tmp_path):
    (image_folder / "train/red/hard.png").hardlink_to(image_folder / "train/red/0.png")
    (image_folder / "train/red/soft.png").symlink_to("1.png")
    source, _ = opened(pack(image_folder, tmp_path / "set.tar"))
    plain, _ = opened(image_folder)
    assert source.fingerprint() == plain.fingerprint()
    assert all(map(np.array_equal, pixels(source.splits["train"]), pixels(plain.splits["train"])))


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_names_may_be_in_any_script(image_folder, tmp_path, form):
    (image_folder / "train/red").rename(image_folder / "train/žába 蛙")
    (image_folder / "val/red").rename(image_folder / "val/žába 蛙")
    source, _ = opened(pack(image_folder, tmp_path / f"動物.{form}"))
    assert "žába 蛙" in source.classes
    assert source_label(DataConfig(source=str(tmp_path / f"動物.{form}"))) == "動物"


def test_what_macos_adds_to_a_zip_is_passed_over(image_folder, tmp_path):
    file = pack(image_folder, tmp_path / "set.zip", "set/")
    with zipfile.ZipFile(file, "a") as packed:
        packed.writestr("__MACOSX/set/train/red/._0.png", b"")
    assert opened(file)[0].fingerprint() == opened(image_folder)[0].fingerprint()


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_a_member_that_does_not_decode_is_named(image_folder, tmp_path, form):
    (image_folder / "train/green/3.png").write_bytes(b"torn")
    file = pack(image_folder, tmp_path / f"set.{form}")
    split = opened(file)[0].splits["train"]
    bad = [verdict for index in range(len(split)) if isinstance(verdict := try_read(split, index), BadImage)]
    assert [item.name for item in bad] == [f"{file}/train/green/3.png"]


def test_damage_inside_a_zip_is_noticed(image_folder, tmp_path):
    file = pack(image_folder, tmp_path / "set.zip")
    with zipfile.ZipFile(file) as packed:
        at = packed.getinfo("train/blue/0.png").header_offset + 300
    content = bytearray(file.read_bytes())
    content[at] ^= 255
    file.write_bytes(content)
    assert isinstance(try_read(opened(file)[0].splits["train"], 0), BadImage)


def test_a_member_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pdvit.data.sources.archive.MOST_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("train/ant/1.png", bytes(2000))
        packed.writestr("val/ant/1.png", bytes(2000))
    found = try_read(opened(tmp_path / "set.zip")[0].splits["train"], 0)
    assert isinstance(found, BadImage)
    assert "2,000 bytes" in found.reason


def _sums(arguments):
    split, indices = arguments
    return [int(np.asarray(split.open(index).convert("RGB")).sum()) for index in indices]


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_processes_read_at_the_same_time(image_folder, tmp_path, form):
    split = opened(pack(image_folder, tmp_path / f"set.{form}"))[0].splits["train"]
    expected = [int(image.sum()) for image in pixels(split)]  # opened before the fork
    with get_context("fork").Pool(2) as pool:
        found = pool.map(_sums, [(split, list(range(24)) * 20)] * 4)
    assert found == [expected * 20] * 4


def test_a_split_can_be_sent_to_another_process(image_folder, tmp_path):
    split = opened(pack(image_folder, tmp_path / "set.tar"))[0].splits["train"]
    again = pickle.loads(pickle.dumps(split))
    shutil.rmtree(image_folder)
    assert again.hash() == split.hash()
    assert again.open(3).size == split.open(3).size


def test_a_tar_of_nothing_and_a_tar_of_text(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as packed:
        info = tarfile.TarInfo("readme.txt")
        info.size = 3
        packed.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(UserError, match="no folder train/"):
        opened(tmp_path / "set.tar")
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(UserError, match="can't be read"):
        opened(tmp_path / "text.tar")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tar", "zip"])
def test_a_real_pack_reads_the_same_from_an_archive(real_data, tmp_path, form):
    """With its greyscale files."""
    plain, _ = opened(real_data / "tiny-imagenet-50")
    packed, _ = opened(pack_folder(real_data / "tiny-imagenet-50", tmp_path / f"tiny.{form}"))
    assert packed.fingerprint() == plain.fingerprint()
    grey = 0
    for index in torch.linspace(0, 24999, 1000).long().tolist():
        with plain.splits["train"].open(index) as ours, packed.splits["train"].open(index) as theirs:
            grey += ours.mode == "L"
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert grey
    assert isinstance(try_read(packed.splits["train"], 0), Image.Image)


def pack_folder(folder, file):
    if file.suffix == ".tar":
        return pack(folder, file, f"{folder.name}/")
    with zipfile.ZipFile(file, "w", strict_timestamps=False) as packed:
        for path in folder.rglob("*"):
            packed.write(path, f"{folder.name}/{path.relative_to(folder)}")
    return file


@pytest.mark.parametrize("form", ["tar.gz", "tar.xz", "tar.bz2"])
def test_damage_inside_a_compressed_tar_is_no_failure_to_write(image_folder, tmp_path, form):
    file = pack(image_folder, tmp_path / f"set.{form}")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    content[-8:] = bytes(8)  # the checksums of gzip
    file.write_bytes(content)
    with pytest.raises(UserError, match="archive can't be read") as caught:
        opened(file)
    assert "again" in caught.value.tip


def test_a_compressed_tar_whose_copy_does_not_fit_is_not_damaged(image_folder, tmp_path, monkeypatch):
    file = pack(image_folder, tmp_path / "set.tar.gz")
    monkeypatch.setattr("pdvit.data.sources.archive._blocks", lambda *_: iter([b"block"] * 3))
    monkeypatch.setattr("pdvit.data.sources.archive.open", full_disk, raising=False)
    with pytest.raises(UserError, match="can't be written: No space") as caught:
        opened(file)
    assert "PDVIT_CACHE" in caught.value.tip


def full_disk(path, mode="r", **options):
    if "w" in mode:
        raise OSError(28, "No space left on device")
    return open(path, mode, **options)


def test_links_over_links_are_followed_and_others_counted(image_folder, tmp_path):
    red = image_folder / "train/red"
    (red / "a.png").symlink_to("b.png")
    (red / "b.png").symlink_to("../blue/0.png")
    plain = len(opened(image_folder)[0].splits["train"])
    (red / "lost.png").symlink_to("nowhere.png")
    (red / "loop.png").symlink_to("loop.png")
    (red / "more").symlink_to("../green")
    source, _ = opened(pack(image_folder, tmp_path / "set.tar"))
    assert len(source.splits["train"]) == plain == 26
    (note,) = (note for note in source.notes if "link" in note)
    assert all(name in note for name in ("3 (", "lost.png", "loop.png", "red/more"))


def test_a_split_that_is_a_link_is_named_where_it_is_missed(image_folder, tmp_path):
    shutil.rmtree(image_folder / "val")
    (image_folder / "val").symlink_to("train")
    with pytest.raises(UserError, match=r"no folder val/.*links that lead to no file.* 1 \(val\)"):
        opened(pack(image_folder, tmp_path / "set.tar"))
