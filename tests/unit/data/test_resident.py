from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from pdvit.config.schema import AugmentConfig
from pdvit.data import resident as module
from pdvit.data.augment import Augmentation
from pdvit.data.images import BadImages
from pdvit.data.loader import LoaderConfig, eval_batches, train_batches
from pdvit.data.mixing import Mixing
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.resident import resident
from pdvit.data.sources.split import ArraySplit, FileSplit, Source
from pdvit.errors import UserError

SIZE = 16
HOW = LoaderConfig(4, 5, 0, torch.device("cpu"), Preprocessing(SIZE, 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3))
OFF = Mixing(cutmix=0.0, prob=0.5, patch_size=4, num_classes=3, labels=False)


def write(folder, sizes):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number, (height, width) in enumerate(sizes):
        coarse = torch.rand(1, 3, 4, 4, generator=generator) * 255
        image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    return FileSplit(paths, torch.arange(len(paths)) % 3)


@pytest.fixture
def source(tmp_path):
    def make(*sizes):
        train = write(tmp_path / "train", sizes * (12 // len(sizes)))
        return Source("made", ["a", "b", "c"], {"train": train, "val": write(tmp_path / "val", [(20, 30)] * 5)})

    return make


@pytest.fixture
def how(device):
    return replace(HOW, device=torch.device(device))


def augmentation_of(split, how, **settings):
    return Augmentation.for_split(split, AugmentConfig(**settings), how.preprocessing, how.seed)


def held(source, wanted="auto", how=HOW, **settings):
    said = []
    augmentation = augmentation_of(source.splits["train"], how, **settings)
    return resident(source, how, augmentation, wanted, said.append), "\n".join(said)


def take(split, how=HOW, count=6, **settings):
    with closing(train_batches(split, how, augmentation_of(split, how, **settings), OFF, 1)) as batches:
        return list(islice(batches, count))


@pytest.mark.parametrize("size", [(16, 16), (10, 14)])
def test_a_resident_set_gives_what_workers_give(source, how, size):
    files = source(size)
    kept, said = held(files, how=how)
    assert isinstance(kept.splits["train"], ArraySplit)
    assert kept.splits["train"].images.shape == (12, 3, *size)
    assert kept.splits["train"].images.device.type == how.device.type
    assert f"on {how.device}" in said
    for ours, theirs in zip(take(kept.splits["train"], how), take(files.splits["train"], how), strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.targets, theirs.targets)
        levels = (ours.images - theirs.images).abs() * 127.5
        assert levels.max() < 2.01
        assert levels.mean() < 0.15


def test_without_rounding_in_the_crop_everything_after_it_is_the_same(source, how):
    files = source((16, 16))
    kept, _ = held(files, how=how)
    more = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "reprob": 0.5}
    ours, theirs = (take(source.splits["train"], how, **more) for source in (kept, files))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.images, other.images)


def test_evaluation_of_a_resident_set_is_the_same_to_the_bit(source, how):
    files = source((16, 16))
    kept, _ = held(files, how=how)
    for ours, theirs in zip(eval_batches(kept.splits["val"], how), eval_batches(files.splits["val"], how), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.targets, theirs.targets)


@pytest.mark.parametrize(
    ("sizes", "wanted", "words"),
    [
        (((16, 16),), "off", "--resident off"),
        (((16, 17),), "auto", "larger than the model's 16x16"),
        (((16, 16), (16, 15)), "auto", "sizes differ: 16x16 and 15x16"),
    ],
)
def test_workers_are_kept_where_something_would_be_lost(source, sizes, wanted, words):
    files = source(*sizes)
    kept, said = held(files, wanted)
    assert kept is files
    assert words in said
    assert "worker processes" in said


def test_a_set_that_takes_too_much_memory_is_left_to_workers(source, monkeypatch):
    files = source((16, 16))
    needed = (12 + 5) * 3 * 16 * 16
    monkeypatch.setattr(module, "memory_of", lambda _: 8 * needed - 1)
    kept, said = held(files)
    assert kept is files
    assert "of memory" in said
    monkeypatch.setattr(module, "memory_of", lambda _: 8 * needed)
    assert held(files)[0] is not files
    monkeypatch.setattr(module, "memory_of", lambda _: needed // 2)
    with pytest.raises(UserError, match="GB of memory"):
        held(files, "on")


def test_on_scales_and_crops_what_does_not_fit(source):
    kept, said = held(source((20, 31), (40, 24)), "on")
    assert kept.splits["train"].images.shape == (12, 3, 16, 16)
    assert "scaled and cropped once" in said
    assert len(take(kept.splits["train"])) == 6


class TestImagesThatDoNotDecode:
    """Another stands in for one that is skipped, which only the workers' path decides."""

    @pytest.fixture
    def broken(self, source):
        files = source((16, 16))
        files.splits["train"].paths[7].write_bytes(b"no image")
        return files

    def test_they_leave_the_set_to_the_workers(self, broken):
        how = replace(HOW, bad=BadImages(skip=True))
        kept, said = held(broken, how=how)
        assert kept is broken
        assert "some do not decode" in said
        assert list(how.bad.found) == [str(broken.splits["train"].paths[7])]

    def test_the_set_can_not_be_kept(self, broken):
        with pytest.raises(UserError, match="can't be kept"):
            held(broken, "on", replace(HOW, bad=BadImages(skip=True)))


def test_what_lies_in_memory_and_is_larger_than_the_input_is_scaled_down_first():
    """A crop is never scaled down on the device, where it would alias."""
    coarse = torch.randint(256, (8, 3, 4, 4)).float()
    large = torch.nn.functional.interpolate(coarse, 2 * SIZE, mode="bilinear").to(torch.uint8)
    split = ArraySplit(large, torch.arange(8) % 3)
    fitted = ArraySplit(HOW.preprocessing.fit(large), split.labels)
    for ours, theirs in zip(take(split, scale=(0.5, 1.0)), take(fitted, scale=(0.5, 1.0)), strict=True):
        assert torch.equal(ours.images, theirs.images)
