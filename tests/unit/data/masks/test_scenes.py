import pickle

import numpy as np
import torch

from pdvit.config.schema import DataConfig
from pdvit.data.masks import scenes
from pdvit.data.masks.scenes import GROUND, SIDE, read_scenes
from pdvit.data.sources.digits import read_digits

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


def test_a_scene_is_a_function_of_its_split_and_number():
    train, again = SOURCE.splits["train"], read_scenes(DataConfig()).splits["train"]
    worker = pickle.loads(pickle.dumps(again))
    some = again.take(torch.tensor([7, 3]))
    for ours, theirs in ((again.scene(7), worker.scene(7)), (some.scene(0), train.scene(7))):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not np.array_equal(train.scene(0)[0], train.scene(1)[0])
    assert not np.array_equal(train.scene(0)[0], SOURCE.splits["val"].scene(0)[0])
    assert (some.name(0), some.mask_name(0)) == ("scene 7 of train", "scene 7 of train")


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
