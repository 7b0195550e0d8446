"""Data sets that timm's `create_dataset` opens by name and that can be read by index: of torchvision, of a hub."""

import io
import os
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources.cache import digest, locked
from pdvit.data.sources.holdout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES, assemble, choose_splits
from pdvit.data.sources.labels import as_classes
from pdvit.data.sources.split import FileSplit, LazySplit, Source
from pdvit.errors import UserError

# Of these torchvision has no validation split: what it calls `train=False` is the published test set.
TRAIN_AND_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")

# What timm takes for a validation split, of torchvision's sets.
EVALUATION_NAMES = (*VALIDATION_NAMES, "eval", "evaluation")


@dataclass(frozen=True)
class ItemSplit(LazySplit):
    """A split of items of a map-style data set, each an image or a stream of its bytes with more behind it."""

    items: Any
    indices: Tensor
    labels: Tensor
    title: str

    def open(self, index: int) -> Image.Image:
        """Fetch an item as an image."""
        found = self.items[int(self.indices[index])][0]
        if isinstance(found, Image.Image):
            return found
        with found:
            return Image.open(io.BytesIO(found.read()))

    def name(self, index: int) -> str:
        """Return the data set and the number of the item in it."""
        return f"{self.title}[{int(self.indices[index])}]"

    def key(self, index: int) -> str:
        """Return the number of the item."""
        return str(int(self.indices[index]))

    def take(self, chosen: Tensor) -> "ItemSplit":
        """Return the items at these indices."""
        return ItemSplit(self.items, self.indices[chosen], self.labels[chosen], self.title)


def read_torchvision(data: DataConfig) -> Source:
    """Read `torch/NAME`, as timm names torchvision's data sets, in `data.root`.

    Where torchvision has train and test only, validation is held out of train unless --val-split is given, which then
    is the test set, as for timm. Raises UserError where the set is unknown or not there.
    """
    name = data.source.rpartition("/")[2].lower()
    if data.root is None:
        raise UserError(f"'{data.source}' lies in a folder of its own", data.source, "name it with --data-dir")
    chosen = choose_splits(["train", "test"] if name in TRAIN_AND_TEST else ["train", "validation"], data)
    if chosen["train"] not in TRAIN_NAMES:  # timm would take any other name for the test set
        raise UserError(f"there is no split '{chosen['train']}' to learn from", data.source, "leave --train-split out")
    for split in chosen.values():
        _check_split(name, split, data)
    sets = {role: open_timm(data, split) for role, split in chosen.items()}
    labels = {role: list(map(int, _targets(items, data.source))) for role, items in sets.items()}
    classes, numbers = as_classes(labels, getattr(sets["train"], "classes", None), data.source)
    parts = {role: _split(items, numbers[role], f"{data.source} {chosen[role]}") for role, items in sets.items()}
    return assemble(name, [_text(item) for item in classes], parts, data)


def read_hub(data: DataConfig) -> Source:
    """Read `hfds/NAME`: a data set of the Hugging Face hub, or a folder that `datasets` can load.

    `data.input_key` and `data.target_key` name its columns (`image` and `label`). Raises UserError where the package
    is missing, or the set does not open.
    """
    need("datasets", "hf-data", data.source)
    name = data.source.partition("/")[2]
    chosen = choose_splits(_split_names(name, data.source), data)
    if "train" not in chosen:
        raise UserError("there is no train split", data.source, "name one: --train-split")
    readers = {role: open_timm(data, split).reader for role, split in chosen.items()}
    names = list(readers["train"].class_to_idx) or None
    labels = {role: list(reader.iter_targets()) for role, reader in readers.items()}
    classes, numbers = as_classes(labels, names, data.source)
    parts = {role: _items(reader, numbers[role], f"{data.source} {chosen[role]}") for role, reader in readers.items()}
    return assemble(name.rpartition("/")[2], classes, parts, data)


def open_timm(data: DataConfig, split: str) -> Any:
    """Return timm's data set of a split, not shuffled; UserError where it does not open.

    What is downloaded, one process fetches while the others wait, and then find it there.
    """
    from timm.data import create_dataset

    keys = {"input_key": data.input_key, "target_key": data.target_key}
    options: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
    root = None if data.root is None else os.path.expanduser(data.root)
    place = "" if root is None else os.path.abspath(root)
    try:
        with locked(f"download-{digest(f'{data.source} {place}')}") if data.download else nullcontext():
            return create_dataset(data.source, root=root, split=split, download=data.download, **options)
    except Exception as error:  # timm, torchvision and the hubs raise nearly anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        tip = "--data-dir says where it lies, --dataset-download fetches it, --train-split and --val-split name splits"
        raise UserError(f"split '{split}' does not open: {reason}", data.source, tip) from error


def need(package: str, extra: str, source: str) -> None:
    """Raise UserError where an optional package is not installed."""
    if find_spec(package) is None:
        what = f"'{source}' needs the package {package}, which is not installed"
        raise UserError(what, "data.source (--data)", f"pip install 'pdvit[{extra}]'")


def _check_split(name: str, split: str, data: DataConfig) -> None:
    """Raise UserError for a split of torchvision that is not there, where timm would take another in its place."""
    synonyms = next((names for names in (TRAIN_NAMES, EVALUATION_NAMES) if split in names), (split,))
    if name in TRAIN_AND_TEST:
        there = split in (*TRAIN_NAMES, *EVALUATION_NAMES, *TEST_NAMES)
    else:
        root = os.path.expanduser(data.root or "")
        folders = name in ("image_folder", "folder") and os.path.isdir(root)
        there = not folders or any(os.path.isdir(os.path.join(root, folder)) for folder in synonyms)
    if not there:
        raise UserError(f"there is no split '{split}'", data.source, "name another with --train-split or --val-split")


def _items(items: Any, labels: Tensor, title: str) -> ItemSplit:
    return ItemSplit(items, torch.arange(len(labels)), labels, title)


def _split_names(name: str, source: str) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_split_names(os.path.expanduser(name)))
    except Exception as error:  # of the network, the hub, the files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        tip = "check the name; without a network, only sets in the cache or a folder can be opened"
        raise UserError(f"the data set does not open: {reason}", source, tip) from error


def _split(items: Any, labels: Tensor, title: str) -> LazySplit:
    """Return a set of torchvision as a split: of its image files, where it lists them, or of its items."""
    listed = getattr(items, "samples", None) or getattr(items, "imgs", None)
    return _items(items, labels, title) if listed is None else FileSplit([Path(file) for file, _ in listed], labels)


def _targets(items: Any, source: str) -> Any:
    """Return the labels of a set of torchvision, without reading an image."""
    targets = getattr(items, "targets", None)
    if targets is None and hasattr(items, "index"):  # of iNaturalist
        targets = [label for label, _ in items.index]
    if targets is None:
        raise UserError("the data set has no list of labels", source, "use it as a folder of images")
    table = torch.as_tensor(targets)
    return table if table.ndim == 1 else table[:, 0]  # QMNIST has more than the class in a row


def _text(name: Any) -> str:
    """Return the name of a class; ImageNet's are several words each."""
    return ", ".join(name) if isinstance(name, list | tuple) else str(name)
