"""Images in class folders: SPLIT/CLASS/IMAGE, or CLASS/IMAGE alone, in any tree of files."""

import torch

from pdvit.config.schema import DataConfig
from pdvit.data.sources.holdout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES, assemble, choose_splits
from pdvit.data.sources.split import LazySplit, Source, some
from pdvit.data.sources.tree import SUFFIXES, Tree, is_image
from pdvit.errors import UserError

WHERE = "data.source (--data)"


def read_layout(tree: Tree, data: DataConfig) -> Source:
    """Read the splits of a tree.

    Raises UserError where it has another layout, where a class has no image in a split, and where a split has a class
    that train has not.
    """
    folders, others = tree.folders(), list[str]()
    splits: dict[str, LazySplit]
    if _is_classes(tree, folders, data):
        splits = {"train": _split(tree, "", folders, others)}
        return assemble(tree.name, folders, splits, data, _said(others))
    chosen = choose_splits(folders, data)
    for name in (chosen.get("train", "train"), data.val_split):
        if name is not None and name not in folders:
            raise _no_folder(tree, name, folders)
    classes = tree.folders(chosen["train"])
    if not classes:
        what = f"no class folders in '{tree.where}/{chosen['train']}'"
        raise UserError(what, WHERE, f"expected {chosen['train']}/CLASS/IMAGE")
    if "test" in chosen and not tree.folders(chosen["test"]):  # loose images: they have no labels
        del chosen["test"]
    if "val" not in chosen and "test" not in chosen:
        raise _no_folder(tree, "val", folders)
    splits = {role: _split(tree, name, classes, others) for role, name in chosen.items()}
    return assemble(tree.name, classes, splits, data, _said(others))


def _is_classes(tree: Tree, folders: list[str], data: DataConfig) -> bool:
    """Tell whether the folders are classes: several, none of a split's name, and each with images directly in it."""
    splits = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES, data.train_split, data.val_split}
    if len(folders) < 2 or splits & set(folders) or data.train_split or data.val_split:
        return False
    return all(any(map(is_image, tree.loose(folder))) for folder in folders)


def _no_folder(tree: Tree, name: str, folders: list[str]) -> UserError:
    found = ", ".join(folders[:6]) or "nothing"
    tip = "lay it out as train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE alone, of which a tenth is held out"
    if name == "val" and folders:
        tip += "; another name: --val-split NAME"
    return UserError(f"'{tree.where}' has no folder {name}/ (found: {found})", WHERE, tip)


def _split(tree: Tree, folder: str, classes: list[str], others: list[str]) -> LazySplit:
    """Read the class folders of a split; add what is no image in a class folder to `others`."""
    where = f"{tree.where}/{folder}".rstrip("/")
    found, here = tree.folders(folder), f"{folder}/" if folder else tree.where
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(
            f"class '{unknown[0]}' of {here} is not in train/ ({len(unknown)} such)",
            where,
            "give every split the same class folders",
        )
    others += tree.loose(folder) if folder else []
    images: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = tree.files(f"{folder}/{name}".lstrip("/")) if name in found else []
        ours = [file for file in files if is_image(file)]
        others += (file for file in files if not is_image(file))
        if not ours:
            raise UserError(
                f"class '{name}' has no images in {here}",
                f"{where}/{name}",
                f"add images ({', '.join(SUFFIXES[:3])}, ...) or remove the class from every split",
            )
        images += ours
        labels += [label] * len(ours)
    return tree.split(images, torch.tensor(labels))


def _said(others: list[str]) -> list[str]:
    """Say which files are not taken for images, or lie outside of class folders."""
    if not others:
        return []
    count = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    return [f"{count} not read, being no image by name or in no class folder: {some(others)}"]
