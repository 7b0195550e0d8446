import multiprocessing
import signal
from dataclasses import replace

import pytest
import torch

from pdvit.data.images import BadImages
from pdvit.data.loader import _end_workers, eval_batches, steps_per_epoch
from pdvit.data.mixing import MODES
from pdvit.data.sources.split import ArraySplit
from pdvit.errors import UserError
from tests.unit.data.batches import CLASSES, LOADER, OFF, ON, join, same, save_images, take

COUNT = 10


def arrays():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (COUNT, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ArraySplit(images, torch.arange(COUNT) % CLASSES)


@pytest.fixture
def image_files(tmp_path):
    return save_images(tmp_path, arrays().images)


@pytest.fixture(params=["array", "files"])
def split(request):
    return arrays() if request.param == "array" else request.getfixturevalue("image_files")


@pytest.mark.parametrize("start", [1, 3, 7])
def test_starting_at_a_step_equals_getting_there(split, start):
    options = {"mixing": replace(ON, labels=True), "shift": 2}
    assert same(take(split, 3, start, **options), take(split, start + 3, **options)[start:])


@pytest.mark.parametrize(
    ("workers", "settings"), [(2, {}), (4, {"auto_augment": "rand-m9-mstd0.5-inc1"}), (2, {"color_jitter": 0.4})]
)
def test_worker_processes_change_nothing(split, workers, settings):
    """With transforms of single images, sets held in memory go to the workers too."""
    found = take(split, 7, 2, replace(LOADER, workers=workers), ON, shift=2, **settings)
    assert same(take(split, 7, 2, LOADER, ON, shift=2, **settings), found)


def test_loading_leaves_the_process_generator_alone(split):
    # Its state decides drop path: a loader that draws from it makes a resumed run another one.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(split, 2, shift=2)
    list(eval_batches(split, LOADER))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_has_every_sample_at_most_once(split):
    epochs = [join(take(split, 3, start))["index"] for start in (0, 3)]
    for indices in epochs:
        assert len(indices.unique()) == len(indices) == 9
    assert not torch.equal(*epochs)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 2), (64, 0)])
def test_evaluation_sees_every_image_once_in_order(split, batch_size, workers):
    found = join(list(eval_batches(split, replace(LOADER, batch_size=batch_size, workers=workers))))
    assert found["index"].tolist() == list(range(COUNT))
    assert found["targets"].tolist() == [i % CLASSES for i in range(COUNT)]
    torch.testing.assert_close(found["images"], arrays().images.float() / 255)


def test_a_batch_larger_than_the_split_is_refused(split):
    with pytest.raises(UserError, match="10 training images are fewer than one batch of 11"):
        steps_per_epoch(split, 11)


def test_without_mixing_every_patch_has_the_class_of_its_image(split):
    for batch in take(split, 4, mixing=replace(OFF, labels=True)):
        expected = batch.index % CLASSES
        assert torch.equal(batch.patch_targets, expected[:, None].expand(-1, 4))
        assert torch.equal(batch.targets.argmax(1), expected)


@pytest.mark.parametrize(("prob", "low", "high"), [(0.0, 0, 0), (0.3, 20, 50), (1.0, 120, 120)])
def test_the_fraction_of_mixed_batches_is_the_probability(prob, low, high):
    batches = take(arrays(), 120, mixing=replace(ON, prob=prob))
    assert low <= sum(batch.targets.ndim == 2 for batch in batches) <= high


def test_workers_that_an_error_left_end_without_another(image_files):
    before = signal.getsignal(signal.SIGCHLD)
    batches = eval_batches(image_files, replace(LOADER, workers=2))
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
        replace(ON, labels=True),
        *(replace(ON, prob=1.0, labels=True, mode=mode) for mode in MODES),
        *(replace(OFF, mixup=1.0, prob=1.0, mode=mode) for mode in MODES),
        replace(ON, mixup=1.0, prob=1.0, labels=True),
    ],
)
def test_the_parts_of_several_processes_make_up_the_batch(split, processes, mixing):
    """Also where images are mixed: each takes its rectangle from the image before it in the whole batch."""
    loader = replace(LOADER, batch_size=4)
    ranks = [replace(loader, rank=rank, processes=processes) for rank in range(processes)]
    parts = [take(split, 5, 2, rank, mixing, shift=2) for rank in ranks]
    for batch, own in zip(take(split, 5, 2, loader, mixing, shift=2), zip(*parts, strict=True), strict=True):
        assert [len(part) for part in own] == [4 // processes] * processes
        assert all(torch.equal(join(own)[name], value) for name, value in batch.tensors().items())


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_held_out_image_is_measured_by_exactly_one_process(split, processes):
    ranks = (replace(LOADER, batch_size=processes, rank=r, processes=processes) for r in range(processes))
    assert join([batch for rank in ranks for batch in eval_batches(split, rank)])["index"].tolist() == list(
        range(COUNT)
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_batch_is_divided_without_loss_and_repeated(size):
    (batch,) = take(arrays(), 1, mixing=replace(ON, labels=True))
    parts = batch.split(size)
    assert [len(part) for part in parts] == [min(size, 3 - at) for at in range(0, 3, size)]
    for name, value in batch.tensors().items():
        assert torch.equal(join(parts)[name], value)
        again = batch.repeat(7).tensors()[name]
        assert len(again) == 7
        assert torch.equal(again[3:6], value)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_the_very_batches_of_one(split, processes):
    whole = list(eval_batches(split, LOADER))
    for rank in range(processes):
        shared = eval_batches(split, replace(LOADER, rank=rank, processes=processes), shared=True)
        assert same(list(shared), whole[rank::processes])


def test_a_shared_batch_without_a_sound_image_is_left_out(image_files):
    for path in image_files.paths[:3]:
        path.write_text("not an image")
    loader = replace(LOADER, processes=2, bad=BadImages(skip=True))
    assert sum(len(batch) for batch in eval_batches(image_files, loader, shared=True)) == 2
    assert len(loader.bad.found) == 3
