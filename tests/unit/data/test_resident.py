from dataclasses import replace

import pytest
import torch

from pdvit.config.schema import AugmentConfig
from pdvit.data import loader as module
from pdvit.data.augment import DEFAULT_HFLIP, DEFAULT_SCALE, Augmentation
from pdvit.data.images import BadImages
from pdvit.data.loader import eval_batches, resident
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import ArraySplit, Source
from pdvit.errors import UserError
from tests.unit.data import batches
from tests.unit.data.batches import save_images

SIZE = 16
PREPROCESSING = Preprocessing(SIZE, 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
LOADER = replace(batches.LOADER, batch_size=4, preprocessing=PREPROCESSING)


def pictures(*sizes):
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.rand(1, 3, 4, 4, generator=generator) * 255 for _ in sizes]
    resized = (torch.nn.functional.interpolate(*pair, mode="bilinear") for pair in zip(coarse, sizes, strict=True))
    return [image[0].to(torch.uint8) for image in resized]


@pytest.fixture
def source(tmp_path):
    def make(*sizes):
        train = save_images(tmp_path / "train", pictures(*sizes * (12 // len(sizes))))
        return Source(
            "made", ["a", "b", "c"], {"train": train, "val": save_images(tmp_path / "val", pictures((20, 30)))}
        )

    return make


@pytest.fixture
def loader(device):
    return replace(LOADER, device=torch.device(device))


def keep(source, setting="auto", loader=LOADER, **settings):
    """Return the source that `resident` makes, and its messages."""
    log, split = [], source.splits["train"]
    augmentation = Augmentation.for_split(split, AugmentConfig(**settings), loader.preprocessing, loader.seed)
    return resident(source, loader, augmentation, setting, log.append), "\n".join(log)


def take(split, loader=LOADER, **settings):
    return batches.take(split, 6, 1, loader, **{"scale": DEFAULT_SCALE, "hflip": DEFAULT_HFLIP} | settings)


@pytest.mark.parametrize("size", [(16, 16), (10, 14)])
def test_a_resident_set_gives_what_workers_give(source, loader, size):
    files = source(size)
    kept, log = keep(files, loader=loader)
    assert isinstance(kept.splits["train"], ArraySplit)
    assert kept.splits["train"].images.shape == (12, 3, *size)
    assert kept.splits["train"].images.device.type == loader.device.type
    assert f"on {loader.device}" in log
    for ours, theirs in zip(take(kept.splits["train"], loader), take(files.splits["train"], loader), strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.targets, theirs.targets)
        levels = (ours.images - theirs.images).abs() * 127.5
        assert levels.max() < 2.01
        assert levels.mean() < 0.15


def test_without_rounding_in_the_crop_everything_is_the_same_to_the_bit(source, loader):
    files = source((16, 16))
    kept, _ = keep(files, loader=loader)
    options = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "reprob": 0.5}
    train = [take(source.splits["train"], loader, **options) for source in (kept, files)]
    assert all(torch.equal(ours.images, theirs.images) for ours, theirs in zip(*train, strict=True))
    assert batches.same(*(eval_batches(source.splits["val"], loader) for source in (kept, files)))


@pytest.mark.parametrize(
    ("sizes", "setting", "words"),
    [
        (((16, 16),), "off", "--resident off"),
        (((16, 17),), "auto", "larger than the model's 16x16"),
        (((16, 16), (16, 15)), "auto", "sizes differ: 16x16 and 15x16"),
    ],
)
def test_workers_are_kept_where_something_would_be_lost(source, sizes, setting, words):
    files = source(*sizes)
    kept, log = keep(files, setting)
    assert kept is files
    assert words in log
    assert "worker processes" in log


def test_a_set_that_takes_too_much_memory_is_left_to_workers(source, monkeypatch):
    files, needed = source((16, 16)), (12 + 1) * 3 * 16 * 16
    for memory, fits in ((8 * needed - 1, False), (8 * needed, True)):
        monkeypatch.setattr(module, "memory_of", lambda _, memory=memory: memory)
        kept, log = keep(files)
        assert (kept is not files) == fits
        assert ("of memory" in log) != fits
    monkeypatch.setattr(module, "memory_of", lambda _: needed // 2)
    with pytest.raises(UserError, match="GB of memory"):
        keep(files, "on")


def test_on_scales_and_crops_what_does_not_fit(source):
    kept, log = keep(source((20, 31), (40, 24)), "on")
    assert kept.splits["train"].images.shape == (12, 3, 16, 16)
    assert "scaled and cropped once" in log
    assert len(take(kept.splits["train"])) == 6


def test_a_set_with_images_that_do_not_decode_is_left_to_workers(source):
    """Another image replaces one that is skipped, and only the workers' path chooses it."""
    files, loader = source((16, 16)), replace(LOADER, bad=BadImages(skip=True))
    path = files.splits["train"].paths[7]
    path.write_bytes(b"no image")
    kept, log = keep(files, loader=loader)
    assert kept is files
    assert "some do not decode" in log
    assert list(loader.bad.found) == [str(path)]
    with pytest.raises(UserError, match="1 image does not decode"):
        keep(files, "on", loader)


def test_images_in_memory_that_are_larger_than_the_input_are_scaled_down_first():
    """A crop is never scaled down on the device, where it would alias."""
    split = ArraySplit(torch.stack(pictures(*[(2 * SIZE, 2 * SIZE)] * 8)), torch.arange(8) % 3)
    fitted = ArraySplit(PREPROCESSING.fit(split.images), split.labels)
    assert batches.same(take(split, scale=(0.5, 1.0)), take(fitted, scale=(0.5, 1.0)))
