import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pdvit.config.schema import DataConfig
from pdvit.data.opening import open_source
from pdvit.errors import UserError


def digits(seed=0):
    return open_source(DataConfig(source="digits", split_seed=seed))


def rows(splits):
    """Return every image of some splits as a row of numbers, in an order of its own."""
    images = torch.cat([split.images for split in splits]).flatten(1).numpy()
    return images[np.lexsort(images.T)]


def test_digits_are_the_originals_enlarged():
    originals = load_digits()
    every = torch.cat([split.images for split in digits().splits.values()])
    labels = torch.cat([split.labels for split in digits().splits.values()])
    counts = np.bincount(originals.target)
    assert labels.bincount().tolist() == counts.tolist()
    for name, size in {"train": 1200, "val": 237, "test": 360}.items():  # stratified
        found = digits().splits[name].labels.bincount(minlength=10).numpy()
        assert np.abs(found - counts * size / 1797).max() <= 1
    assert torch.equal(every[:, 0], every[:, 1])
    assert torch.equal(every[:, 0], every[:, 2])
    assert every.min() == 0
    # Enlarging four times keeps the mean of an image up to the border, and 16 becomes 255.
    means = np.sort(every[:, 0].float().mean((1, 2)).numpy())
    assert np.abs(means - np.sort(originals.images.mean((1, 2)) * 255 / 16)).max() < 3


def test_the_split_seed_decides_what_is_held_out():
    assert np.array_equal(rows([digits(0).splits["test"]]), rows([digits(0).splits["test"]]))
    for name in ("test", "val"):
        assert not np.array_equal(rows([digits(0).splits[name]]), rows([digits(1).splits[name]]))
    assert np.array_equal(rows(digits(0).splits.values()), rows(digits(1).splits.values()))


def test_some_digits_keep_their_splits_and_begin_at_zero():
    whole, some = open_source(DataConfig()), open_source(DataConfig(source="digits:5-9"))
    assert some.classes == ["5", "6", "7", "8", "9"]
    for name, split in some.splits.items():
        chosen = whole.splits[name].labels >= 5
        assert torch.equal(split.images, whole.splits[name].images[chosen])
        assert torch.equal(split.labels, whole.splits[name].labels[chosen] - 5)
    assert some.fingerprint() != whole.fingerprint()


@pytest.mark.parametrize("source", ["digits:", "digits:4", "digits:4-4", "digits:9-5", "digits:0-12", "digits:a-b"])
def test_another_range_of_digits_is_refused(source):
    with pytest.raises(UserError, match="no range of digits"):
        open_source(DataConfig(source=source))
