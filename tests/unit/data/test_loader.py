import multiprocessing
import signal
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from pdvit.config.schema import AugmentConfig
from pdvit.data.augment import Augmentation
from pdvit.data.images import BadImages
from pdvit.data.loader import LoaderConfig, _end_workers, eval_batches, shared_batches, steps_per_epoch, train_batches
from pdvit.data.mixing import MODES, Mixing
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import ArraySplit, FileSplit
from pdvit.errors import UserError

COUNT, CLASSES, SIZE = 10, 3, 8
CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(SIZE, 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3)
HOW = LoaderConfig(batch_size=3, seed=5, workers=0, device=CPU, preprocessing=PREPROCESSING)
AUGMENT = AugmentConfig(shift=2)
OFF = Mixing(cutmix=0.0, prob=0.5, patch_size=4, num_classes=CLASSES, labels=False)
ON = replace(OFF, cutmix=1.0)


def arrays():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (COUNT, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return ArraySplit(images, torch.arange(COUNT) % CLASSES)


@pytest.fixture
def image_files(tmp_path):
    split = arrays()
    paths = [tmp_path / f"{number}.png" for number in range(COUNT)]
    for path, image in zip(paths, split.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return FileSplit(paths, split.labels)


@pytest.fixture(params=["array", "files"])
def split(request):
    return arrays() if request.param == "array" else request.getfixturevalue("image_files")


def take(split, count, start=0, how=HOW, mixing=OFF, augment=AUGMENT):
    augmentation = Augmentation.for_split(split, augment, how.preprocessing, how.seed)
    with closing(train_batches(split, how, augmentation, mixing, start)) as batches:
        return list(islice(batches, count))


def all_same(ours, theirs):
    pairs = [(a.tensors(), b.tensors()) for a, b in zip(ours, theirs, strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_starting_at_a_step_equals_getting_there(split, start):
    mixing = replace(ON, labels=True)
    assert all_same(take(split, 3, start, mixing=mixing), take(split, start + 3, mixing=mixing)[start:])


@pytest.mark.parametrize(
    ("workers", "settings"), [(2, {}), (4, {"auto_augment": "rand-m9-mstd0.5-inc1"}), (2, {"color_jitter": 0.4})]
)
def test_worker_processes_change_nothing(split, workers, settings):
    """With transforms of single images, sets held in memory go to the workers too."""
    augment = AugmentConfig(shift=2, **settings)
    found = take(split, 7, 2, replace(HOW, workers=workers), ON, augment)
    assert all_same(take(split, 7, 2, HOW, ON, augment), found)


def test_loading_leaves_the_process_generator_alone(split):
    # Its state decides drop path: a loader that draws from it makes a resumed run another one.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(split, 2)
    list(eval_batches(split, HOW))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_has_every_sample_at_most_once(split):
    epochs = [torch.cat([batch.index for batch in take(split, 3, start)]) for start in (0, 3)]
    for indices in epochs:
        assert len(indices.unique()) == len(indices) == 9
    assert not torch.equal(*epochs)


def by_sample(split, batch_size):
    batches = take(split, COUNT // batch_size, how=replace(HOW, batch_size=batch_size))
    return {int(i): image for batch in batches for i, image in zip(batch.index, batch.images, strict=True)}


def test_augmentation_does_not_depend_on_the_batch(split):
    small, large = by_sample(split, 2), by_sample(split, 5)
    assert len(small) == len(large) == COUNT
    assert all(torch.equal(small[index], large[index]) for index in small)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 2), (64, 0)])
def test_evaluation_sees_every_image_once_in_order(split, batch_size, workers):
    batches = list(eval_batches(split, replace(HOW, batch_size=batch_size, workers=workers)))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(COUNT))
    assert torch.cat([batch.targets for batch in batches]).tolist() == [i % CLASSES for i in range(COUNT)]
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), arrays().images.float() / 255)


def test_a_batch_larger_than_the_split_is_refused(split):
    with pytest.raises(UserError, match="10 training images are fewer than one batch of 11") as caught:
        steps_per_epoch(split, 11)
    assert "at most 10" in caught.value.tip


def test_without_mixing_every_patch_has_the_class_of_its_image(split):
    for batch in take(split, 4, mixing=replace(OFF, labels=True)):
        expected = batch.index % CLASSES
        assert torch.equal(batch.patch_targets, expected[:, None].expand(-1, 4))
        assert batch.targets.shape in ((3,), (3, CLASSES))
        hard = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        assert torch.equal(hard, expected)


@pytest.mark.parametrize(("prob", "low", "high"), [(0.0, 0, 0), (0.3, 90, 150), (1.0, 400, 400)])
def test_the_share_of_mixed_batches_is_the_probability(prob, low, high):
    batches = take(arrays(), 400, mixing=replace(ON, prob=prob))
    assert low <= sum(batch.targets.ndim == 2 for batch in batches) <= high


def test_workers_that_an_error_left_end_without_another(image_files):
    before = signal.getsignal(signal.SIGCHLD)
    batches = eval_batches(image_files, replace(HOW, workers=2))
    next(batches)
    try:
        workers = [child for child in multiprocessing.active_children() if child.daemon]
        _end_workers()
        for worker in workers:
            worker.join(5)
        assert len(workers) == 2
        assert not any(worker.is_alive() for worker in workers)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "mixing",
    [
        OFF,
        ON,
        replace(ON, labels=True),
        *(replace(ON, prob=1.0, labels=True, mode=mode) for mode in MODES),
        *(replace(OFF, mixup=1.0, prob=1.0, mode=mode) for mode in MODES),
        replace(ON, mixup=1.0, prob=1.0, labels=True),
    ],
)
@pytest.mark.parametrize("start", [0, 3])
def test_the_shares_of_several_processes_make_up_the_batch(split, processes, mixing, start):
    """Also where images are mixed: each takes its rectangle from the image before it in the whole batch."""
    how = replace(HOW, batch_size=4)
    whole = take(split, 5, start, how, mixing)
    shares = [take(split, 5, start, replace(how, rank=r, processes=processes), mixing) for r in range(processes)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert [len(part) for part in parts] == [4 // processes] * processes
        for name, value in batch.tensors().items():
            assert torch.equal(torch.cat([part.tensors()[name] for part in parts]), value), name


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_held_out_image_is_measured_by_exactly_one_process(split, processes):
    seen = [
        index
        for rank in range(processes)
        for batch in eval_batches(split, replace(HOW, batch_size=processes, rank=rank, processes=processes))
        for index in batch.index.tolist()
    ]
    assert seen == list(range(COUNT))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_batch_is_divided_without_loss_and_repeated(size):
    (batch,) = take(arrays(), 1, mixing=replace(ON, labels=True))
    parts = batch.split(size)
    assert [len(part) for part in parts] == [min(size, 3 - at) for at in range(0, 3, size)]
    for name, value in batch.tensors().items():
        assert torch.equal(torch.cat([part.tensors()[name] for part in parts]), value)
        again = batch.repeat(7).tensors()[name]
        assert len(again) == 7
        assert torch.equal(again[3:6], value)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_the_very_batches_of_one(split, processes):
    whole = list(eval_batches(split, HOW))
    shares = [list(shared_batches(split, replace(HOW, rank=rank, processes=processes))) for rank in range(processes)]
    for rank, share in enumerate(shares):
        assert len(share) == len(whole[rank::processes])
        assert all_same(share, whole[rank::processes])


def test_a_shared_batch_without_a_sound_image_is_left_out(image_files):
    for path in image_files.paths[:3]:
        path.write_text("not an image")
    how = replace(HOW, processes=2, bad=BadImages(skip=True))
    assert sum(len(batch) for batch in shared_batches(image_files, how)) == 2
    assert len(how.bad.found) == 3
