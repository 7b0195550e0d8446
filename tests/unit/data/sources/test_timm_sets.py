import pickle
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from pdvit.config.schema import DataConfig
from pdvit.data.images import BadImage, try_read
from pdvit.data.sources.timm_sets import open_timm
from tests.errors import refused
from tests.unit.data.batches import opened


@pytest.fixture
def mnist(tmp_path):
    """MNIST's own files, of 40 training and 20 test images, each as bright as its number."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 20)):
        images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels)
    return tmp_path


def test_a_set_of_torchvision_is_the_one_of_timm(mnist):
    source = opened("torch/mnist", root=str(mnist), val_split="validation")
    assert len(source.classes) == 10
    for split, theirs in (("train", "train"), ("val", "validation")):
        expected = create_dataset("torch/mnist", root=str(mnist), split=theirs)
        ours = source.splits[split]
        assert len(ours) == len(expected)
        for index in range(len(ours)):
            image, label = expected[index]
            assert int(ours.labels[index]) == label
            assert np.array_equal(np.asarray(ours.open(index)), np.asarray(image))
    assert source.splits["val"].name(3) == "torch/mnist validation[3]"


def test_the_published_test_set_is_for_the_closing_numbers(mnist):
    source = opened("torch/mnist", root=str(mnist))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 30, "val": 10, "test": 20}
    assert source.final_split == "test"
    brightness = {int(np.asarray(source.splits["val"].open(index))[0, 0]) for index in range(10)}
    assert brightness.isdisjoint(int(np.asarray(source.splits["train"].open(index))[0, 0]) for index in range(30))


def test_a_set_of_files_is_read_from_its_files(image_folder):
    source = opened("torch/image_folder", root=str(image_folder))
    plain = opened(image_folder)
    assert source.fingerprint() == plain.fingerprint()
    assert source.splits["train"].paths == plain.splits["train"].paths


@pytest.mark.parametrize(
    ("source", "options", "what", "tip"),
    [
        ("torch/cifar100", {}, "needs the folder", "--data-dir"),
        ("torch/image_folder", {}, "needs the folder", "--data-dir"),
        ("torch/cifar100", {"root": "/nowhere"}, "not found", "--dataset-download"),
        ("torch/cifar1000", {"root": "/nowhere"}, "Unknown torchvision dataset", ""),
        ("torch/mnist", {"root": "/nowhere", "train_split": "all"}, "no split 'all'", "--train-split"),
        ("torch/mnist", {"root": "/nowhere", "val_split": "val[:10%]"}, "no split 'val[:10%]'", "--val-split"),
    ],
)
def test_a_set_that_does_not_open_says_why(source, options, what, tip):
    with refused(what, tip=tip):
        opened(source, **options)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("needs the package datasets", tip="pdvit[hf-data]"):
        opened("hfds/owner/name")


@pytest.mark.filterwarnings("ignore")
def test_a_folder_as_a_set_of_the_hub(image_folder, tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed (extra hf-data)")
    (image_folder / "train/red/7.png").write_bytes(b"torn")
    source = opened(f"hfds/{image_folder}", root=str(tmp_path / "hub"))
    assert source.classes == ["blue", "green", "red"]
    train = source.splits["train"]
    assert train.labels.bincount().tolist() == [8, 8, 8]
    verdicts = [try_read(train, index) for index in range(24)]
    (bad,) = (index for index, verdict in enumerate(verdicts) if isinstance(verdict, BadImage))
    assert verdicts[bad].name == f"hfds/{image_folder} train[{bad}]"
    expected = {np.asarray(Image.open(path)).tobytes() for path in (image_folder / "train/red").glob("[0-6].png")}
    red = [index for index in range(24) if train.labels[index] == 2 and index != bad]
    assert {np.asarray(verdicts[index]).tobytes() for index in red} == expected
    assert pickle.loads(pickle.dumps(train)).open(red[0]).size == train.open(red[0]).size
    part = opened(f"hfds/{image_folder}", root=str(tmp_path / "hub"), train_split="train[:50%]")
    assert len(part.splits["train"]) == 12
    assert "have no image in train: red" in part.describe()


def test_one_process_downloads_at_a_time(tmp_path, monkeypatch):
    """Two threads stand for two processes: a lock on a file holds between open files, whoever has opened them."""
    inside, most = [], []

    def create(*_, **__):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()

    monkeypatch.setattr("timm.data.create_dataset", create)
    data = DataConfig(source="torch/mnist", root=str(tmp_path), download=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: open_timm(data, "train"), range(4)))
    assert most == [1, 1, 1, 1]
