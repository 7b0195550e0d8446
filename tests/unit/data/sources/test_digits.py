import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pdvit.config.schema import DataConfig
from pdvit.data.sources import digits as scenes
from pdvit.data.sources.digits import GROUND, SIDE, read_digits, read_scenes
from pdvit.errors import UserError
from tests.unit.data.batches import opened


def test_digits_are_the_originals_enlarged():
    originals, source = load_digits(), opened("digits", split_seed=3)
    every = source.select("all").images
    rest, test = train_test_split(range(1797), test_size=360, random_state=3, stratify=originals.target)
    train, val = train_test_split(rest, test_size=237, random_state=3, stratify=originals.target[rest])
    for name, part in {"train": train, "val": val, "test": test}.items():
        split = source.splits[name]
        assert split.labels.tolist() == originals.target[part].tolist()
        # Enlarging four times keeps the mean of an image up to the border, and 16 becomes 255.
        means = split.images[:, 0].float().mean((1, 2)).numpy()
        assert np.abs(means - originals.images[part].mean((1, 2)) * 255 / 16).max() < 3
    other = opened("digits", split_seed=1).fingerprint()
    assert all(found != other[name] for name, found in source.fingerprint().items() if name != "classes")
    assert (every == every[:, :1]).all()
    assert every.min() == 0


def test_some_digits_keep_their_splits_and_begin_at_zero():
    whole, some = opened("digits"), opened("digits:5-9")
    assert some.classes == ["5", "6", "7", "8", "9"]
    for name, split in some.splits.items():
        chosen = whole.splits[name].labels >= 5
        assert torch.equal(split.images, whole.splits[name].images[chosen])
        assert torch.equal(split.labels, whole.splits[name].labels[chosen] - 5)
    assert some.fingerprint() != whole.fingerprint()


@pytest.mark.parametrize("source", ["digits:", "digits:4", "digits:4-4", "digits:9-5", "digits:0-12", "digits:a-b"])
def test_another_range_of_digits_is_refused(source):
    with pytest.raises(UserError, match="no range of digits"):
        opened(source)


SOURCE = read_scenes(DataConfig())


def test_scenes_have_the_digits_of_their_split_and_the_ground_as_classes():
    digits = read_digits(DataConfig()).splits
    assert SOURCE.classes == [*"0123456789", "ground"]
    assert len(set(SOURCE.palette)) == len(SOURCE.classes)
    assert "scenes: 11 classes, images: 4,096 train" in SOURCE.describe()
    for name, split in SOURCE.splits.items():
        assert len(split) == scenes.COUNTS[name]
        assert torch.equal(split.digits.images, digits[name].images)
        assert torch.equal(split.digits.labels, digits[name].labels)
    found = torch.zeros(11, dtype=torch.long)
    for index in range(60):
        image, mask = SOURCE.splits["train"].open(index), SOURCE.splits["train"].mask(index)
        assert (image.mode, image.size, mask.shape, mask.dtype) == ("RGB", (SIDE, SIDE), (SIDE, SIDE), torch.uint8)
        assert 1 <= len(set(mask.unique().tolist()) - {GROUND}) <= scenes.DIGITS[1]
        grey = np.asarray(image).mean(2)  # strokes stand out
        assert abs(grey[mask != GROUND].mean() - grey[mask == GROUND].mean()) > 40
        found += mask.flatten().long().bincount(minlength=11)
    assert (found > 0).all()


def test_scenes_are_the_same_on_every_machine_and_others_have_another_fingerprint(monkeypatch):
    before, ours = torch.get_rng_state(), read_scenes(DataConfig()).fingerprint()
    assert torch.equal(torch.get_rng_state(), before)
    assert [ours[name]["hash"] for name in scenes.COUNTS] == [
        "55c1619c8536ff5c",
        "a8ead6c8f116ca43",
        "3d961821df642121",
    ]
    assert read_scenes(DataConfig(split_seed=1)).fingerprint() != ours
    monkeypatch.setattr(scenes, "LIGHT", (150, 255))  # other pixels of the same digits
    assert read_scenes(DataConfig()).fingerprint() != ours
