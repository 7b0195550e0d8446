from dataclasses import replace

import pytest
import torch

from pdvit.data.images import BadImages
from pdvit.data.loader import eval_batches
from pdvit.errors import UserError
from tests.unit.data.batches import LOADER, join, save_images, take

COUNT, BAD = 12, (3, 4, 11)
REPLACED_BY = {3: 5, 4: 5, 11: 0}
CROPPED = {"scale": (1.0, 1.0), "hflip": 0.0}


@pytest.fixture
def split(tmp_path):
    """Twelve images, each as bright as ten times its number and a class of its own; three do not decode."""
    brightness = torch.arange(COUNT, dtype=torch.uint8) * 10
    files = save_images(tmp_path, brightness[:, None, None, None].expand(-1, 3, 8, 8))
    for number in BAD:
        files.paths[number].write_bytes(b"torn")
    return replace(files, labels=torch.arange(COUNT))


def skipping(**options):
    return replace(LOADER, batch_size=4, bad=BadImages(skip=True), **options)


def numbers(images):
    return (images[:, 0, 0, 0] * 25.5).round().long().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_sound_image_replaces_a_bad_one_with_its_own_class(split, workers):
    # the order of an epoch does not depend on which images are bad
    sound = replace(split, paths=[split.paths[0] if number in BAD else split.paths[number] for number in range(COUNT)])
    planned = join(take(sound, 6, loader=skipping(), **CROPPED))["index"].tolist()
    batches = take(split, 6, loader=skipping(workers=workers), **CROPPED)
    assert [len(batch) for batch in batches] == [4] * 6
    found = join(batches)
    expected = [REPLACED_BY.get(index, index) for index in planned]
    assert found["index"].tolist() == found["targets"].tolist() == numbers(found["images"]) == expected
    assert found["replaced"].tolist() == [index in BAD for index in planned]


def test_evaluation_leaves_them_out_and_passes_over_a_batch_of_them_only_in_the_evaluation_of_one_process(split):
    """Processes have to run the same number of batches."""
    found = join(list(eval_batches(split, skipping(workers=2))))
    expected = [number for number in range(COUNT) if number not in BAD]
    assert numbers(found["images"]) == found["index"].tolist() == expected
    bad, loader = split.take(torch.tensor(BAD)), replace(skipping(), batch_size=1)
    assert [numbers(batch.images) for batch in eval_batches(split.take(torch.tensor([BAD[0], 1])), loader)] == [[1]]
    assert list(eval_batches(bad, loader)) == []
    shared = eval_batches(split.take(torch.tensor([*BAD, 0])), replace(loader, processes=2, rank=1), shared=True)
    assert [numbers(batch.images) for batch in shared] == [[0]]
    with pytest.raises(UserError, match="not decode"):
        list(eval_batches(bad, skipping(processes=2)))
    with pytest.raises(UserError, match="3 images do not decode"):
        take(bad, 1, loader=replace(skipping(), batch_size=2))
