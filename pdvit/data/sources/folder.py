"""Images in class folders, SPLIT/CLASS/IMAGE or CLASS/IMAGE alone, on the disk or in a plain tar."""

import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources import WHERE, first_names
from pdvit.data.sources.split import (
    TEST_NAMES,
    TRAIN_NAMES,
    VALIDATION_NAMES,
    FileSplit,
    LazySplit,
    Source,
    assemble,
    choose_splits,
)
from pdvit.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLIT_NAMES = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}
LAYOUT = "lay it out as train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE alone, of which a tenth is held out"
# The files below a split folder by class folder, in order; those of "" are in no class folder.
ClassFiles = dict[str, list[str]]


class Tree(NamedTuple):
    """Files below a root: their paths, and those of all folders, which end in `/`; and how to make a split of some."""

    name: str
    root: str
    paths: Iterable[str]
    make_split: Callable[[list[str], Tensor], LazySplit]


def in_order(paths: Iterable[str]) -> list[str]:
    """Sort paths folder by folder, as `pathlib` does; resume depends on this order."""
    return sorted(paths, key=lambda path: path.split("/"))


def is_image(name: str) -> bool:
    """Return whether the suffix is that of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def read_folder(root: Path, data: DataConfig) -> Source:
    """Read a folder on the disk, of its split folders if it has any; raises UserError."""
    names = folder_names(root)
    splits = [name for name in names if name in {*SPLIT_NAMES, data.train_split, data.val_split}]
    below = (path for name in splits or names for path in _walk(root, f"{name}/", depth=1))
    paths = [*(f"{name}/" for name in names), *below]

    def make_split(files: list[str], labels: Tensor) -> LazySplit:
        return FileSplit([root / file for file in files], labels)

    return read_tree(Tree(root.resolve().name, str(root), paths, make_split), data)


def folder_names(root: Path) -> list[str]:
    """Return the names of the folders in a folder, in order, without hidden ones; raises UserError."""
    return sorted(entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith("."))


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, in order; raises UserError if a folder can't be read."""
    return [folder / path for path in in_order(_walk(folder, depth=2)) if is_image(path)]


def _walk(root: Path, below: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the paths below a folder; links to split and class folders are followed, deeper ones are files."""
    for entry in _entries(root / below):
        path = f"{below}{entry.name}"
        if entry.is_dir(follow_symlinks=depth < 2):
            yield f"{path}/"
            yield from _walk(root, f"{path}/", depth + 1)
        else:
            yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        what = f"the folder can't be read: {error.strerror}"
        raise UserError(what, str(error.filename), "check the path and its permissions") from error


class Member(NamedTuple):
    """A file in a tar: its path, and the offset and number of its bytes."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarSplit(LazySplit):
    """A split of members of a plain tar, read by their offsets."""

    archive: str
    members: list[Member]
    labels: Tensor

    def open(self, index: int) -> Image.Image:
        """Open a member as an image; raises EOFError if the tar is cut off."""
        member = self.members[index]
        with open(self.archive, "rb") as file:
            content = os.pread(file.fileno(), member.size, member.offset)
        if len(content) < member.size:
            raise EOFError("the archive ends in the middle of it")
        return Image.open(io.BytesIO(content))

    def name(self, index: int) -> str:
        """Return archive and member."""
        return f"{self.archive}/{self.members[index].path}"


def read_tar(path: Path, data: DataConfig) -> Source:
    """Read a plain tar like a folder, with a note on its symbolic links and special files, which are not read.

    A single folder around everything is left out, unless it is a split. Raises UserError if the tar is damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            infos = {posixpath.normpath(info.name).lstrip("/"): info for info in tar.getmembers()}
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("it ends before its last block")  # tarfile takes a cut for the end
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        what = f"the archive can't be read: {str(error) or type(error).__name__}"
        raise UserError(what, str(path), "copy or download it again") from error
    files = {name: info for name, info in infos.items() if info.isreg() and not info.issparse()}
    for name, info in infos.items():
        if info.islnk() and (target := posixpath.normpath(info.linkname).lstrip("/")) in files:
            files[name] = files[target]
    links = [name for name, info in infos.items() if not (name in files or info.isdir())]
    paths = [*files, *(f"{name}/" for name, info in infos.items() if info.isdir() and name != ".")]
    root, inside = "", paths
    while len(top := {name.partition("/")[0] for name in inside}) == 1 and not top & SPLIT_NAMES:
        (folder,) = top
        if root + folder in files:
            break
        root += f"{folder}/"
        inside = [name.removeprefix(f"{folder}/") for name in inside if name != f"{folder}/"]

    def make_split(names: list[str], labels: Tensor) -> LazySplit:
        found = {name: files[root + name] for name in names}
        members = [Member(root + name, info.offset_data, info.size) for name, info in found.items()]
        return TarSplit(str(path), members, labels)

    note = f"links and special files in the tar, not read: {len(links):,} ({first_names(links)})" if links else ""
    return read_tree(Tree(path.stem, str(path), inside, make_split), data).noting(note)


def read_tree(tree: Tree, data: DataConfig) -> Source:
    """Read the splits of a tree.

    Raises UserError if the layout is another, a class has no image in a split, or a split has a class that train lacks.
    """
    folders, others, notes = _by_class(tree.paths), list[str](), list[str]()
    names = [name for name in folders if not name.startswith(".")]
    named = SPLIT_NAMES & set(names) or data.train_split or data.val_split
    if len(names) > 1 and not named and all(any(map(is_image, _loose(folders[name]))) for name in names):
        classes, files = names, {name: in_order(chain.from_iterable(folders[name].values())) for name in names}
        splits = {"train": _split(tree, "", files, classes, others)}
    else:
        chosen = choose_splits(names, data)
        if "test" in chosen and not _classes(folders[chosen["test"]]):  # loose images: they have no labels
            del chosen["test"]
        for name in ({"train": "train"} | ({} if "test" in chosen else {"val": "val"}) | chosen).values():
            if name not in names:
                found = ", ".join(names[:6]) or "nothing"
                tip = LAYOUT + ("; another name: --val-split NAME" if name == "val" and names else "")
                raise UserError(f"'{tree.root}' has no folder {name}/ (found: {found})", WHERE, tip)
        classes = _classes(folders[chosen["train"]])
        if not classes:
            what = f"no class folders in '{tree.root}/{chosen['train']}'"
            raise UserError(what, WHERE, f"expected {chosen['train']}/CLASS/IMAGE")
        splits = {role: _split(tree, name, folders[name], classes, others) for role, name in chosen.items()}
    if others:
        count = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
        notes = [f"{count} not read, being no image by name or in no class folder: {first_names(others)}"]
    return assemble(tree.name, classes, splits, data, notes)


def _by_class(paths: Iterable[str]) -> dict[str, ClassFiles]:
    folders: dict[str, ClassFiles] = {}
    for path in in_order(paths):
        folder, slash, rest = path.partition("/")
        if slash:
            name, slash, _ = rest.partition("/")
            files = folders.setdefault(folder, {}).setdefault(name if slash else "", [])
            files += [] if path.endswith("/") else [path]
    return folders


def _classes(files: ClassFiles) -> list[str]:
    return [name for name in files if name and not name.startswith(".")]


def _loose(files: ClassFiles) -> list[str]:
    return [file for file in files.get("", ()) if not posixpath.basename(file).startswith(".")]


def _split(tree: Tree, folder: str, files: ClassFiles, classes: list[str], others: list[str]) -> LazySplit:
    """Read the class folders of a split; add the other files to `others`."""
    where, here = (f"{tree.root}/{folder}", f"{folder}/") if folder else (tree.root, tree.root)
    if unknown := sorted(set(_classes(files)) - set(classes)):
        what = f"class '{unknown[0]}' of {here} is not in train/ ({len(unknown)} such)"
        raise UserError(what, where, "give every split the same class folders")
    others += _loose(files)
    images: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        class_images = [file for file in files.get(name, ()) if is_image(file)]
        others += (file for file in files.get(name, ()) if not is_image(file))
        if not class_images:
            tip = f"add images ({', '.join(SUFFIXES[:3])}, ...) or remove the class from every split"
            raise UserError(f"class '{name}' has no images in {here}", f"{where}/{name}", tip)
        images += class_images
        labels += [label] * len(class_images)
    return tree.make_split(images, torch.tensor(labels))
