"""Data sets of torchvision and the Hugging Face hub that timm's `create_dataset` opens and reads by index."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pdvit.config.schema import DataConfig
from pdvit.data.sources import WHERE
from pdvit.data.sources.folder import read_folder
from pdvit.data.sources.split import SPLIT_NAMES, TRAIN_NAMES, FileSplit, ItemSplit, Source, assemble, choose_splits
from pdvit.errors import UserError
from pdvit.files import reading

# torchvision has no validation split of these: `train=False` is the published test set.
TRAIN_AND_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
KNOWN_SPLITS = {*SPLIT_NAMES, "eval", "evaluation"}  # by timm
TIP = "name another with --train-split or --val-split"


def read_torchvision(data: DataConfig, training: bool = True) -> Source:
    """Read `torch/NAME`, a data set of torchvision by timm's name, in `data.root`; raises UserError."""
    name = data.source.rpartition("/")[2].lower()
    if data.root is None:
        what = f"'{data.source}' needs the folder of the data set"
        raise UserError(what, "data.root (--data-dir)", "name the folder with --data-dir")
    if name in ("folder", "image_folder"):
        return read_folder(replace(data, source=data.root), training)
    found = ["train", "test" if name in TRAIN_AND_TEST else "validation", data.train_split, data.val_split]
    chosen = choose_splits(found, data, data.source, TIP, training=True)
    for role, split in chosen.items():  # timm would take any other name for the test set
        if split not in (TRAIN_NAMES if role == "train" else KNOWN_SPLITS if name in TRAIN_AND_TEST else [split]):
            raise UserError(f"there is no split '{split}' for {role}", data.source, TIP)
    return _read_splits(name, chosen, data, training)


def read_hub(data: DataConfig, training: bool = True) -> Source:
    """Read `hfds/NAME`: a data set of the Hugging Face hub, or a folder that `datasets` can load; raises UserError."""
    try:
        import datasets
    except ImportError as error:
        what = f"'{data.source}' needs the package datasets, which is not installed"
        raise UserError(what, WHERE, "pip install 'pdvit[hf-data]'") from error
    name = data.source.partition("/")[2]
    tip = "check the name; without a network, only sets in the cache or a folder can be opened"
    with reading(data.source, tip, "the data set does not open"):
        found = datasets.get_dataset_split_names(os.path.expanduser(name))
    slices = [data.train_split, data.val_split]  # such as train[:10%]
    chosen = choose_splits([*found, *slices], data, data.source, TIP, training=True, needed=["train"])
    return _read_splits(name.rpartition("/")[2], chosen, data, training)


def open_timm(data: DataConfig, split: str) -> Any:
    """Return timm's data set of a split, not shuffled; raises UserError if it does not open."""
    from timm.data import create_dataset

    options: dict[str, Any] = {"input_key": data.input_key, "target_key": data.target_key}
    options = {key: value for key, value in options.items() if value is not None}
    root = None if data.root is None else os.path.expanduser(data.root)
    tip = "--data-dir names its folder, --dataset-download downloads it, --train-split and --val-split name splits"
    lock = _lock(root) if data.download and root else nullcontext()  # `datasets`, which needs no root, has its own
    with reading(data.source, tip, f"split '{split}' does not open"), lock:
        return create_dataset(data.source, root=root, split=split, download=data.download, **options)


@contextmanager
def _lock(root: str) -> Iterator[None]:
    """Let one process download at a time."""
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, ".pdvit-download.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _targets(items: Any, source: str) -> list[Any]:
    """Return the labels of a set of torchvision or of a reader of timm, without reading an image."""
    if hasattr(items, "iter_targets"):
        return list(items.iter_targets())
    targets = getattr(items, "targets", None)
    if targets is None and hasattr(items, "index"):  # of iNaturalist
        targets = [label for label, _ in items.index]
    if targets is None:
        raise UserError("the data set has no list of labels", source, "use it as a folder of images")
    labels: list[Any] = torch.as_tensor(targets).reshape(len(targets), -1)[:, 0].tolist()  # QMNIST: first of eight
    return labels


def _read_splits(name: str, chosen: dict[str, str], data: DataConfig, training: bool) -> Source:
    """Return a source of timm's splits by role; raises UserError for a label that is not one of the classes.

    Whole numbers are indices of the set's classes, or else of as many classes as train counts up to; texts are class
    names, sorted.
    """
    opened = {role: open_timm(data, split) for role, split in chosen.items()}
    sets = {role: getattr(items, "reader", items) for role, items in opened.items()}  # a set of the hub has a reader
    train = opened["train"]
    names = train.reader.class_to_idx if hasattr(train, "reader") else getattr(train, "classes", None)
    classes: Sequence[Any] | None = [*names] if names else None
    labels = {role: _targets(items, data.source) for role, items in sets.items()}
    if classes is None and all(isinstance(label, str) for label in labels["train"]):
        classes = sorted(set(labels["train"]))
        known = {text: index for index, text in enumerate(classes)}
        labels = {role: [known.get(label, label) for label in values] for role, values in labels.items()}
    if classes is None:
        classes = range(max((label for label in labels["train"] if type(label) is int), default=-1) + 1)
    splits: dict[str, FileSplit | ItemSplit] = {}
    for role, values in labels.items():
        for index, label in enumerate(values):
            if type(label) is not int or not 0 <= label < len(classes):
                what = f"label {label!r} of sample {index} in {role} is none of the {len(classes)} classes"
                tip = "-1 often means that a split has no labels: name another with --val-split"
                raise UserError(what, data.source, tip)
        items, numbers = sets[role], torch.tensor(values, dtype=torch.long)
        if files := getattr(items, "samples", None) or getattr(items, "imgs", None):
            splits[role] = FileSplit([Path(file) for file, _ in files], numbers)
        else:
            splits[role] = ItemSplit(items, [*range(len(values))], numbers, f"{data.source} {chosen[role]}")
    texts = [", ".join(item) if isinstance(item, list | tuple) else str(item) for item in classes]  # synonyms: ImageNet
    return assemble(name, texts, splits, data, training)
