from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from pdvit.config.schema import AugmentConfig
from pdvit.data.augment import Augmentation
from pdvit.data.images import BadImage, BadImages, refuse_bad
from pdvit.data.loader import LoaderConfig, eval_batches, train_batches
from pdvit.data.mixing import Mixing
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import FileSplit
from pdvit.errors import UserError

COUNT, CLASSES, BAD = 12, 12, (3, 4, 11)
STANDS_IN = {3: 5, 4: 5, 11: 0}
PREPROCESSING = Preprocessing(8, 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3)
PLAIN = AugmentConfig(scale=(1.0, 1.0), hflip=0.0)
OFF = Mixing(cutmix=0.0, prob=0.5, patch_size=4, num_classes=CLASSES, labels=False)


@pytest.fixture
def split(tmp_path):
    """Twelve images, each as bright as ten times its number and a class of its own; three do not decode."""
    paths = [tmp_path / f"{number:02}.png" for number in range(COUNT)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(path)
    for number in BAD:
        paths[number].write_bytes(b"torn")
    return FileSplit(paths, torch.arange(COUNT))


def loading(**options):
    how = LoaderConfig(batch_size=4, seed=5, workers=0, device=torch.device("cpu"), preprocessing=PREPROCESSING)
    return replace(how, bad=BadImages(skip=True), **options)


def take(split, count, how, start=0, mixing=OFF, augment=PLAIN):
    augmentation = Augmentation.for_split(split, augment, how.preprocessing, how.seed)
    with closing(train_batches(split, how, augmentation, mixing, start)) as batches:
        return list(islice(batches, count))


def numbers(batch):
    return (batch.images[:, 0, 0, 0] * 25.5).round().long().tolist()


def same(ours, theirs):
    pairs = [(a.tensors(), b.tensors()) for a, b in zip(ours, theirs, strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def test_the_next_sound_image_takes_the_place_with_its_own_class(split):
    sound = replace(split, paths=[*split.paths])
    for number in BAD:
        sound.paths[number] = split.paths[0]  # the order of an epoch does not depend on what is bad
    wanted = torch.cat([batch.index for batch in take(sound, 6, loading())]).tolist()
    batches = take(split, 6, loading())
    assert [len(batch) for batch in batches] == [4] * 6
    found = torch.cat([batch.index for batch in batches]).tolist()
    assert found == [STANDS_IN.get(index, index) for index in wanted]
    assert torch.cat([batch.targets for batch in batches]).tolist() == found
    assert [number for batch in batches for number in numbers(batch)] == found
    replaced = torch.cat([batch.replaced for batch in batches]).tolist()
    assert replaced == [index in BAD for index in wanted]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4])
def test_a_step_is_the_same_whenever_it_is_run(split, start, workers):
    mixing, augment = replace(OFF, cutmix=1.0, labels=True), AugmentConfig()
    through = take(split, 6, loading(), mixing=mixing, augment=augment)
    assert same(take(split, 6 - start, loading(workers=workers), start, mixing, augment), through[start:])


@pytest.mark.parametrize("mode", ["batch", "pair"])
def test_the_shares_of_several_processes_make_up_the_batch(split, mode):
    mixing = replace(OFF, cutmix=1.0, prob=1.0, labels=True, mode=mode)
    whole = take(split, 6, loading(), mixing=mixing)
    shares = [take(split, 6, loading(rank=rank, processes=2), mixing=mixing) for rank in range(2)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        for name, value in batch.tensors().items():
            assert torch.equal(torch.cat([part.tensors()[name] for part in parts]), value), name


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_them_out(split, workers):
    batches = list(eval_batches(split, loading(workers=workers)))
    found = [number for batch in batches for number in numbers(batch)]
    assert found == [number for number in range(COUNT) if number not in BAD]
    assert torch.cat([batch.index for batch in batches]).tolist() == found


def test_a_batch_of_evaluation_without_any_is_passed_over(split):
    how = loading(batch_size=1)
    assert [numbers(batch) for batch in eval_batches(split.take(torch.tensor([BAD[0], 1])), how)] == [[1]]
    assert list(eval_batches(split.take(torch.tensor(BAD)), how)) == []


def test_batches_without_a_sound_image_are_refused_in_training_and_in_several_processes(split):
    """Processes have to run the same number of batches, so none can be passed over."""
    bad = split.take(torch.tensor(BAD))
    with pytest.raises(UserError, match="not decode"):
        list(eval_batches(bad, loading(processes=2)))
    with pytest.raises(UserError, match="3 images do not decode"):
        take(bad, 1, loading(batch_size=2))


def test_without_skipping_the_first_one_ends_it(split):
    how = replace(loading(), bad=BadImages())
    for read in (lambda: take(split, 3, how), lambda: list(eval_batches(split, how))):
        with pytest.raises(UserError, match="not decode"):
            read()
    assert take(split.take(torch.tensor([0, 1, 2, 5])), 1, how)[0].replaced is None


def test_bad_images_are_named_and_the_rest_counted():
    refuse_bad({})
    with pytest.raises(UserError) as caught:
        BadImages().add([BadImage(f"place/{number}.png", "torn") for number in range(13)])
    assert "13 images do not decode" in caught.value.what
    assert "place/0.png (torn)" in caught.value.where
    assert "place/9.png" in caught.value.where
    assert "place/10.png" not in caught.value.where
    assert "and 3 more" in caught.value.where
    assert "--on-bad-image skip" in caught.value.tip
