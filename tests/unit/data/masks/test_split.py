import pickle

import torch

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.bad_images import BadImage, BadMask
from pdvit.data.masks.sources import open_masks
from pdvit.data.masks.split import try_pair


def train_of(root):
    return open_masks(DataConfig(source=str(root)), SegmentConfig()).splits["train"]


def test_a_pair_is_an_image_and_its_mask(camvid):
    split = train_of(camvid)
    image, mask = try_pair(split, 2)
    assert image.mode == "RGB"
    assert image.size == mask.shape[::-1]
    assert torch.equal(mask, split.mask(2))


def test_what_is_wrong_is_told_of_the_image_or_of_the_mask(camvid):
    split = train_of(camvid)
    (camvid / "images/train/1.png").write_bytes(b"torn")
    (camvid / "masks/train/2.png").write_bytes(b"torn")
    (camvid / "masks/train/3.png").unlink()
    image, mask, gone = (try_pair(split, index) for index in range(3))
    assert (type(image), image.name[-12:], image.reason) == (BadImage, "/train/1.png", "not an image")
    assert (type(mask), mask.name[-18:]) == (BadMask, "/masks/train/2.png")
    assert isinstance(gone, BadMask)
    assert "No such file" in gone.reason


def test_a_part_of_a_split_is_read_as_the_whole(camvid):
    split = train_of(camvid)
    some = pickle.loads(pickle.dumps(split)).take(torch.tensor([5, 0]))
    assert some.labels.tolist() == [0, 1]
    assert [some.name(0), some.mask_name(1)] == [split.name(5), split.mask_name(0)]
    assert torch.equal(some.mask(0), split.mask(5))
    assert some.hash() != split.hash()
