"""Data sets of torchvision and the Hugging Face hub that timm's `create_dataset` opens and reads by index."""

import fcntl
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources.holdout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES, assemble, choose_splits
from pdvit.data.sources.split import FileSplit, LazySplit, Source
from pdvit.errors import UserError

# torchvision has no validation split of these: `train=False` is the published test set.
TRAIN_AND_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")

# Validation splits of torchvision's sets, by timm's names.
EVALUATION_NAMES = (*VALIDATION_NAMES, "eval", "evaluation")


@dataclass(frozen=True)
class ItemSplit(LazySplit):
    """A split of items of a map-style data set, whose first element is an image or a stream of its bytes."""

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

    If torchvision has train and test only, validation is held out of train unless --val-split is given, which then
    is the test set, as in timm. Raises UserError if the set is unknown or missing.
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
    names: list[Any] = classes  # ImageNet's are tuples of synonyms
    names = [", ".join(item) if isinstance(item, list | tuple) else str(item) for item in names]
    return assemble(name, names, parts, data)


def read_hub(data: DataConfig) -> Source:
    """Read `hfds/NAME`: a data set of the Hugging Face hub, or a folder that `datasets` can load.

    `data.input_key` and `data.target_key` name its columns (`image` and `label`). Raises UserError where the package
    is missing, or the set does not open.
    """
    if find_spec("datasets") is None:
        what = f"'{data.source}' needs the package datasets, which is not installed"
        raise UserError(what, "data.source (--data)", "pip install 'pdvit[hf-data]'")
    import datasets

    name = data.source.partition("/")[2]
    try:
        found = list(datasets.get_dataset_split_names(os.path.expanduser(name)))
    except Exception as error:  # of the network, the hub, the files
        tip = "check the name; without a network, only sets in the cache or a folder can be opened"
        raise UserError(f"the data set does not open: {_first_line(error)}", data.source, tip) from error
    chosen = choose_splits(found, data)
    if "train" not in chosen:
        raise UserError("there is no train split", data.source, "name one: --train-split")
    readers = {role: open_timm(data, split).reader for role, split in chosen.items()}
    names = list(readers["train"].class_to_idx) or None
    labels = {role: list(reader.iter_targets()) for role, reader in readers.items()}
    classes, numbers = as_classes(labels, names, data.source)
    parts = {role: _split(reader, numbers[role], f"{data.source} {chosen[role]}") for role, reader in readers.items()}
    return assemble(name.rpartition("/")[2], classes, parts, data)


def open_timm(data: DataConfig, split: str) -> Any:
    """Return timm's data set of a split, not shuffled; raises UserError if it does not open."""
    from timm.data import create_dataset

    keys = {"input_key": data.input_key, "target_key": data.target_key}
    options: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
    root = None if data.root is None else os.path.expanduser(data.root)
    try:
        # `datasets`, which needs no root, has locks of its own
        with _download_lock(root) if data.download and root else nullcontext():
            return create_dataset(data.source, root=root, split=split, download=data.download, **options)
    except Exception as error:  # timm, torchvision and the hubs raise nearly anything
        tip = "--data-dir names its folder, --dataset-download downloads it, --train-split and --val-split name splits"
        raise UserError(f"split '{split}' does not open: {_first_line(error)}", data.source, tip) from error


@contextmanager
def _download_lock(root: str) -> Iterator[None]:
    """Let one process download while the others wait."""
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, ".pdvit-download.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def as_classes(
    labels: Mapping[str, Sequence[Any]], names: Sequence[str] | None, where: str
) -> tuple[list[str], dict[str, Tensor]]:
    """Return the classes, and the class index of each sample `(N,)` by split.

    Whole numbers are indices of `names`, or of as many classes as train counts up to. Texts are class names, sorted.
    Raises UserError for a label that is not one of the classes.
    """
    if names is None and all(isinstance(label, str) for label in labels["train"]):
        names = sorted(set(labels["train"]))
        known = {name: index for index, name in enumerate(names)}
        labels = {split: [known.get(label, label) for label in values] for split, values in labels.items()}
    if names is None:
        whole = [label for label in labels["train"] if _is_whole(label)]
        names = [str(index) for index in range(max(whole, default=-1) + 1)]
    for split, values in labels.items():
        outside = [place for place, label in enumerate(values) if not (_is_whole(label) and 0 <= label < len(names))]
        if outside:
            what = f"label {values[outside[0]]!r} of sample {outside[0]} in {split} is none of the {len(names)} classes"
            raise UserError(what, where, "-1 often means that a split has no labels: name another with --val-split")
    return list(names), {split: torch.tensor(values, dtype=torch.long) for split, values in labels.items()}


def _is_whole(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool)


def _check_split(name: str, split: str, data: DataConfig) -> None:
    """Raise UserError for a missing split of torchvision, for which timm would open another."""
    synonyms = next((names for names in (TRAIN_NAMES, EVALUATION_NAMES) if split in names), (split,))
    if name in TRAIN_AND_TEST:
        there = split in (*TRAIN_NAMES, *EVALUATION_NAMES, *TEST_NAMES)
    else:
        root = os.path.expanduser(data.root or "")
        folders = name in ("image_folder", "folder") and os.path.isdir(root)
        there = not folders or any(os.path.isdir(os.path.join(root, folder)) for folder in synonyms)
    if not there:
        raise UserError(f"there is no split '{split}'", data.source, "name another with --train-split or --val-split")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _split(items: Any, labels: Tensor, title: str) -> LazySplit:
    """Return a split of the image files of a set, if it lists them, or of its items."""
    listed = getattr(items, "samples", None) or getattr(items, "imgs", None)
    if listed is None:
        return ItemSplit(items, torch.arange(len(labels)), labels, title)
    return FileSplit([Path(file) for file, _ in listed], labels)


def _targets(items: Any, source: str) -> Any:
    """Return the labels of a set of torchvision, without reading an image."""
    targets = getattr(items, "targets", None)
    if targets is None and hasattr(items, "index"):  # of iNaturalist
        targets = [label for label, _ in items.index]
    if targets is None:
        raise UserError("the data set has no list of labels", source, "use it as a folder of images")
    table = torch.as_tensor(targets)
    return table if table.ndim == 1 else table[:, 0]  # QMNIST has more than the class in a row
