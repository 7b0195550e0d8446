import pytest
import torch

from pdvit.config.schema import DataConfig
from pdvit.data.check import check_images
from pdvit.data.sources import open_source
from pdvit.errors import UserError


@pytest.fixture
def torn(image_folder):
    for name in ("train/red/0.png", "train/red/5.png", "val/green/1.png"):
        (image_folder / name).write_bytes(b"torn")
    return open_source(DataConfig(source=str(image_folder)))


def check(source, skip=False, workers=0, **more):
    return check_images(source, skip, workers, lambda text: None, **more)


def test_sound_images_change_nothing_but_are_said(image_folder):
    source = open_source(DataConfig(source=str(image_folder)))
    checked = check(source)
    assert checked.fingerprint() == source.fingerprint()
    assert "all images decode" in checked.describe()


@pytest.mark.parametrize("workers", [0, 2])
def test_all_bad_images_are_named_before_the_start(torn, workers):
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="3 images do not decode") as caught:
        check(torn, workers=workers)
    assert all(name in caught.value.where for name in ("train/red/0.png", "train/red/5.png", "val/green/1.png"))
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_images_are_left_out_and_counted(torn):
    checked = check(torn, skip=True)
    assert {name: len(split) for name, split in checked.splits.items()} == {"train": 22, "val": 5}
    assert "left out 2 of train and 1 of val" in checked.describe()
    assert "red/5.png" in checked.describe()
    assert all("red/5.png" not in str(path) for path in checked.splits["train"].paths)
    assert checked.splits["val"].labels.bincount().tolist() == [2, 1, 2]


def test_a_class_that_loses_its_last_image_is_said(torn, image_folder):
    (image_folder / "val/green/0.png").write_bytes(b"")
    assert "1 of 3 classes have no image in val: green" in check(torn, skip=True).describe()


def test_processes_share_the_work(torn):
    parts = []
    for rank in range(2):
        with pytest.raises(UserError):
            check(torn, share=(rank, 2), gather=lambda found: parts.append(found) or [found])
    first, second = parts[:2], parts[2:]
    assert [sorted({**one, **other}) for one, other in zip(first, second, strict=True)] == [[16, 21], [3]]
    assert all(index % 2 == rank for rank, half in ((0, first), (1, second)) for found in half for index in found)


def test_images_in_memory_need_no_check():
    source = open_source(DataConfig())
    assert check(source).fingerprint() == source.fingerprint()


def test_a_split_without_any_sound_image_is_refused_before_the_start(torn, image_folder):
    for file in (image_folder / "val").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no image of val decodes"):
        check(torn, skip=True)
