import multiprocessing
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from pdvit.config.schema import AugmentConfig
from pdvit.data import loader as module
from pdvit.data.augment import DEFAULT_HFLIP, DEFAULT_SCALE, Augmentation
from pdvit.data.images import BadImage, BadImages, Samples, pixels_of, read_whole
from pdvit.data.loader import _end_workers, decode, eval_batches, resident, steps_per_epoch
from pdvit.data.mixing import MODES
from pdvit.data.preprocessing import Preprocessing, _copy_stream, copy_to
from pdvit.data.sources.split import ArraySplit, FileSplit, Source
from pdvit.errors import RunFailed, UserError
from tests.unit.data.batches import CLASSES, LOADER, OFF, ON, join, mixing, same, save_images, take

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


def test_an_epoch_has_every_sample_at_most_once_and_leaves_the_process_generator_alone(split):
    before = torch.get_rng_state()  # decides drop path: if a loader drew from it, a resumed run would be another one
    epochs = [join(take(split, 3, start, shift=2))["index"] for start in (0, 3)]
    list(eval_batches(split, LOADER))
    assert torch.equal(torch.get_rng_state(), before)
    for indices in epochs:
        assert len(indices.unique()) == len(indices) == 9
    assert not torch.equal(*epochs)
    with pytest.raises(UserError, match="10 training images are fewer than one batch of 11"):
        steps_per_epoch(split, 11)


@pytest.mark.parametrize(
    ("batch_size", "workers", "processes"), [(1, 0, 1), (3, 2, 1), (64, 0, 1), (2, 0, 2), (3, 0, 3), (4, 0, 4)]
)
def test_evaluation_sees_every_image_once_in_order(split, batch_size, workers, processes):
    loader = replace(LOADER, batch_size=batch_size, workers=workers, processes=processes)
    found = join([batch for rank in range(processes) for batch in eval_batches(split, replace(loader, rank=rank))])
    assert found["index"].tolist() == list(range(COUNT))
    assert found["targets"].tolist() == [i % CLASSES for i in range(COUNT)]
    torch.testing.assert_close(found["images"], arrays().images.float() / 255)


def test_workers_that_an_error_left_end_without_another(image_files, monkeypatch):
    """There are as many workers as batches."""
    before, loader = signal.getsignal(signal.SIGCHLD), replace(LOADER, batch_size=-(-len(image_files) // 2), workers=4)
    batches = eval_batches(image_files, loader)
    next(batches)
    monkeypatch.setattr(torch.utils.data._utils, "python_exit_status", True)  # as at exit: the killed may hold locks
    try:
        workers = [child for child in multiprocessing.active_children() if child.daemon]
        _end_workers()
        for worker in workers:
            worker.join(5)
        assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2
        batches.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"worker \(pid.* (killed|exited)"),
        (lambda: os.open("/", os.O_WRONLY), "Is a directory"),
        (lambda: [(BadImage(lambda: None, "a name that can't be sent"), 0, 0)], r"worker \(pid.* exited"),
    ],
)
def test_a_worker_that_dies_or_fails_ends_the_wait_with_its_reason(fault, reason):
    def read(split, epoch, indices):
        return fault() if indices[0] else [(torch.zeros(3, 8, 8, dtype=torch.uint8), 0, 0)]

    with pytest.raises(RunFailed, match=reason):
        list(decode(Samples(arrays(), read), replace(LOADER, workers=2), [(0, [index]) for index in range(9)]))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "mixed",
    [
        OFF,
        replace(ON, labels=True),
        *(mixing(True, cutmix=1.0, mixup_prob=1.0, mixup_mode=mode) for mode in MODES),
        *(mixing(mixup=1.0, mixup_prob=1.0, mixup_mode=mode) for mode in MODES),
        mixing(True, cutmix=1.0, mixup=1.0, mixup_prob=1.0),
    ],
)
def test_the_parts_of_several_processes_make_up_the_batch(split, processes, mixed):
    """Also where images are mixed: each takes its rectangle from the image before it in the whole batch."""
    loader = replace(LOADER, batch_size=4, bad=BadImages(skip=True))
    if isinstance(split, FileSplit):
        split.paths[4].write_bytes(b"torn")  # another image replaces it
    ranks = [replace(loader, rank=rank, processes=processes) for rank in range(processes)]
    parts = [take(split, 5, 2, rank, mixed, shift=2) for rank in ranks]
    for batch, own in zip(take(split, 5, 2, loader, mixed, shift=2), zip(*parts, strict=True), strict=True):
        assert [len(part) for part in own] == [4 // processes] * processes
        assert all(torch.equal(join(own)[name], value) for name, value in join([batch]).items())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_batch_is_divided_without_loss_and_repeated(size):
    (batch,) = take(arrays(), 1, mixing=replace(ON, labels=True))
    parts = batch.split(size)
    assert [len(part) for part in parts] == [min(size, 3 - at) for at in range(0, 3, size)]
    for name, value in join([batch]).items():
        assert torch.equal(join(parts)[name], value)
        assert torch.equal(getattr(batch.repeat(7), name), value[[0, 1, 2, 0, 1, 2, 0]])


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_the_very_batches_of_one(split, processes):
    whole = list(eval_batches(split, LOADER))
    for rank in range(processes):
        shared = eval_batches(split, replace(LOADER, rank=rank, processes=processes), shared=True)
        assert same(list(shared), whole[rank::processes])


LARGER = replace(LOADER, batch_size=4, preprocessing=Preprocessing(16, 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3))


def pictures(*sizes):
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.rand(1, 3, 4, 4, generator=generator) * 255 for _ in sizes]
    resized = (torch.nn.functional.interpolate(*pair, mode="bilinear") for pair in zip(coarse, sizes, strict=True))
    return [image[0].to(torch.uint8) for image in resized]


@pytest.fixture
def source(tmp_path):
    def make(*sizes):
        train = save_images(tmp_path / "train", pictures(*sizes * (12 // len(sizes))))
        val = save_images(tmp_path / "val", pictures((20, 30)))
        return Source("made", ["a", "b", "c"], {"train": train, "val": val})

    return make


@pytest.fixture
def loader(device):
    return replace(LARGER, device=torch.device(device))


def keep(source, setting="auto", loader=LARGER, **settings):
    """Return the source that `resident` makes, and its messages."""
    log, split = [], source.splits["train"]
    augmentation = Augmentation.for_split(split, AugmentConfig(**settings), loader.preprocessing, loader.seed)
    return resident(source, loader, augmentation, setting, log.append), "\n".join(log)


def training(split, loader=LARGER, **settings):
    return take(split, 6, 1, loader, **{"scale": DEFAULT_SCALE, "hflip": DEFAULT_HFLIP} | settings)


@pytest.mark.parametrize("size", [(16, 16), (10, 14)])
def test_a_resident_set_gives_what_workers_give(source, loader, size):
    files = source(size)
    kept, log = keep(files, loader=loader)
    assert isinstance(kept.splits["train"], ArraySplit)
    assert kept.splits["train"].images.shape == (12, 3, *size)
    assert kept.splits["train"].images.device.type == loader.device.type
    assert f"on {loader.device}" in log
    found, expected = (training(source.splits["train"], loader) for source in (kept, files))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.targets, theirs.targets)
        levels = (ours.images - theirs.images).abs() * 127.5
        assert levels.max() < 2.01
        assert levels.mean() < 0.15


def test_a_resident_set_is_collected_on_the_host(source, monkeypatch):
    """A meta tensor has no values, so pixels that went to the device one batch at a time would be lost."""
    split, meta = source((16, 16)).splits["val"], replace(LARGER, device=torch.device("meta"))
    monkeypatch.setattr(torch, "empty", torch.zeros)
    found = module._decoded(Samples(split, partial(read_whole, pixels_of)), meta, "val", print)
    assert torch.equal(found[0], pictures((20, 30))[0])


def test_without_rounding_in_the_crop_everything_is_the_same_to_the_bit(source, loader):
    files = source((16, 16))
    kept, _ = keep(files, loader=loader)
    options = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "reprob": 0.5}
    train = [training(source.splits["train"], loader, **options) for source in (kept, files)]
    assert all(torch.equal(ours.images, theirs.images) for ours, theirs in zip(*train, strict=True))
    assert same(*(eval_batches(source.splits["val"], loader) for source in (kept, files)))


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
    assert len(training(kept.splits["train"])) == 6


def test_a_set_with_images_that_do_not_decode_is_left_to_workers(source):
    """Another image replaces one that is skipped, and only the workers' path chooses it."""
    files, loader = source((16, 16)), replace(LARGER, bad=BadImages(skip=True))
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
    split = ArraySplit(torch.stack(pictures(*[(32, 32)] * 8)), torch.arange(8) % 3)
    fitted = ArraySplit(LARGER.preprocessing.fit(split.images), split.labels)
    assert same(training(split, scale=(0.5, 1.0)), training(fitted, scale=(0.5, 1.0)))


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(8, 1, 8), (8, 4, 2), (2, 4, 1), (64, 1, 16)])
def test_by_default_ranks_of_a_machine_share_its_cores_as_workers(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert replace(LOADER, workers=None).worker_count == workers
    assert replace(LOADER, workers=3).worker_count == 3


@pytest.mark.gpu
def test_copies_do_not_wait_for_the_step_before():
    device, images = torch.device("cuda", 0), torch.arange(300.0).pin_memory()
    copy_to(device, images, images)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # cycles: a step that takes half a second
    busy = torch.cuda.Event()
    busy.record()
    found, _ = copy_to(device, images, images)
    _copy_stream(device).synchronize()
    assert not busy.query()
    assert torch.equal(found.cpu(), images)
