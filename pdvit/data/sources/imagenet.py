"""ImageNet-1k as Kaggle hands it out; sorted into train/WNID and val/WNID it is a folder like any other."""

import csv

import torch

from pdvit.config.schema import DataConfig
from pdvit.data.sources.holdout import assemble, choose_splits
from pdvit.data.sources.split import Source, some
from pdvit.data.sources.tree import Tree, is_image
from pdvit.errors import UserError

# Where the images lie, and which table has the classes of the validation images.
IMAGES, SOLUTION = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"
TIP = "leave --train-split and --val-split out"


def is_kaggle(tree: Tree) -> bool:
    """Tell whether a tree is Kaggle's: ILSVRC/Data/CLS-LOC with train/WNID and a flat val/."""
    parts = IMAGES.split("/")
    return all(part in tree.folders("/".join(parts[:depth])) for depth, part in enumerate(parts))


def read_kaggle(tree: Tree, data: DataConfig) -> Source:
    """Read train/WNID, and val/ with the classes in LOC_val_solution.csv; test/ has no labels.

    Raises UserError where the table is missing, or lacks an image.
    """
    for name in choose_splits(["train", "val"], data).values():
        if name not in ("train", "val"):
            raise UserError(f"there is no split '{name}': only train/ and val/ have labels", tree.where, TIP)
    classes = tree.folders(f"{IMAGES}/train")
    files = [tree.files(f"{IMAGES}/train/{name}") for name in classes]
    train = [(file, label) for label, names in enumerate(files) for file in names if is_image(file)]
    found = [file for file in tree.loose(f"{IMAGES}/val") if is_image(file)]
    if not (train and found):
        raise UserError(f"no images in train/ or val/ of {IMAGES}", tree.where, "unpack the whole archive")
    wnids = _solution(tree)
    numbers = {name: label for label, name in enumerate(classes)}
    unknown = [file for file in found if wnids.get(_id(file)) not in numbers]
    if unknown:
        what = f"{len(unknown)} images of val/ have no class of train/ in {SOLUTION}: {some(unknown)}"
        raise UserError(what, tree.where, "restore the table")
    labels = [numbers[wnids[_id(file)]] for file in found]
    splits = {
        "train": tree.split([file for file, _ in train], torch.tensor([label for _, label in train])),
        "val": tree.split(found, torch.tensor(labels)),
    }
    return assemble(tree.name, classes, splits, data, [f"val: classes from {SOLUTION}"])


def _solution(tree: Tree) -> dict[str, str]:
    """Return the WordNet id of each validation image: the first word after its own id."""
    if SOLUTION not in tree.loose():
        tip = "it comes with the images on Kaggle; or sort them into val/WNID"
        raise UserError(f"{IMAGES}/val has no class folders, and {SOLUTION} is not there", tree.where, tip)
    lines = tree.read(SOLUTION).decode("utf-8").splitlines()[1:]
    return {row[0]: row[1].split()[0] for row in csv.reader(lines) if len(row) > 1 and row[1].split()}


def _id(file: str) -> str:
    return file.rpartition("/")[2].partition(".")[0]
