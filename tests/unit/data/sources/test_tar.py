import tarfile
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from pdvit.config.schema import DataConfig
from pdvit.data.images import BadImage, try_read
from pdvit.data.opening import open_source
from pdvit.errors import UserError


def opened(path, **options):
    return open_source(DataConfig(source=str(path), **options))


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
        assert torch.equal(packed.splits[name].labels, split.labels)
        assert all(map(np.array_equal, pixels(packed.splits[name]), pixels(split)))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, "members"])
def test_an_archive_that_is_cut_off_is_refused(image_folder, tmp_path, kept):
    file = pack(image_folder, tmp_path / "set.tar")
    content = file.read_bytes()
    with tarfile.open(file) as packed:
        last = packed.getmembers()[-1].offset  # a cut between two members is the end for Python's tarfile
    file.write_bytes(content[: last if kept == "members" else int(len(content) * kept)])
    with pytest.raises(UserError, match="can't be read") as caught:
        opened(file)
    assert str(tmp_path) in caught.value.where


def test_hard_links_in_a_tar_are_read_and_symbolic_ones_counted(image_folder, tmp_path):
    (image_folder / "train/red/hard.png").hardlink_to(image_folder / "train/red/0.png")
    plain = opened(image_folder)
    (image_folder / "train/red/soft.png").symlink_to("1.png")
    source = opened(pack(image_folder, tmp_path / "set.tar"))
    assert source.fingerprint() == plain.fingerprint()
    assert all(map(np.array_equal, pixels(source.splits["train"]), pixels(plain.splits["train"])))
    (note,) = (note for note in source.notes if "links" in note)
    assert "1 (train/red/soft.png)" in note


def test_a_member_that_does_not_decode_is_named(image_folder, tmp_path):
    (image_folder / "train/green/3.png").write_bytes(b"torn")
    file = pack(image_folder, tmp_path / "set.tar")
    split = opened(file).splits["train"]
    bad = [fault for index in range(len(split)) if isinstance(fault := try_read(split, index), BadImage)]
    assert [item.name for item in bad] == [f"{file}/train/green/3.png"]


def _sums(arguments):
    split, indices = arguments
    return [int(np.asarray(split.open(index).convert("RGB")).sum()) for index in indices]


def test_processes_read_at_the_same_time(image_folder, tmp_path):
    split = opened(pack(image_folder, tmp_path / "set.tar")).splits["train"]
    expected = [int(image.sum()) for image in pixels(split)]  # opened before the fork
    with get_context("fork").Pool(2) as pool:
        found = pool.map(_sums, [(split, list(range(24)) * 20)] * 4)
    assert found == [expected * 20] * 4
