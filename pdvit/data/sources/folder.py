"""Images in class folders, SPLIT/CLASS/IMAGE or CLASS/IMAGE alone, on the disk or in a plain tar."""

import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources.holdout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES, assemble, choose_splits
from pdvit.data.sources.split import FileSplit, LazySplit, Source, some
from pdvit.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLIT_NAMES = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}
WHERE = "data.source (--data)"


class Tree:
    """Folders and files by their path below a root, with `/` between the parts.

    Args:
        paths: of all files and folders; those of folders end in `/`.
        make_split: returns the split of some files with their class indices `(N,)`.
    """

    def __init__(
        self, name: str, where: str, paths: Iterable[str], make_split: Callable[[list[str], Tensor], LazySplit]
    ) -> None:
        self.name, self.where, self.make_split = name, where, make_split
        self._folders: dict[str, set[str]] = {"": set()}
        self._files: dict[str, list[str]] = {}
        for path in in_order(paths):
            folder = path.rpartition("/")[0]
            self._add_folder(folder)
            if not path.endswith("/"):
                self._files.setdefault(folder, []).append(path)

    def _add_folder(self, path: str) -> None:
        if path not in self._folders:
            parent, _, name = path.rpartition("/")
            self._add_folder(parent)
            self._folders[parent].add(name)
            self._folders[path] = set()

    def folders(self, folder: str = "") -> list[str]:
        """Return the names of the folders in a folder, in order, without hidden ones."""
        return sorted(name for name in self._folders.get(folder, ()) if not name.startswith("."))

    def loose(self, folder: str = "") -> list[str]:
        """Return the paths of the files directly in a folder, in order, without hidden ones."""
        return [file for file in self._files.get(folder, ()) if not file.rpartition("/")[2].startswith(".")]

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder, in order."""
        below = (self.files(f"{folder}/{name}") for name in self._folders.get(folder, ()))
        return in_order([*self._files.get(folder, ()), *(file for files in below for file in files)])


def in_order(paths: Iterable[str]) -> list[str]:
    """Sort paths folder by folder, as `pathlib` does; resume depends on this order."""
    return sorted(paths, key=lambda path: path.split("/"))


def is_image(name: str) -> bool:
    """Return whether the suffix is that of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def folder_tree(root: Path, data: DataConfig) -> Tree:
    """Return the tree of a folder on the disk, of its split folders if it has any; raises UserError."""
    names = folder_names(root)
    splits = [name for name in names if name in {*SPLIT_NAMES, data.train_split, data.val_split}]
    below = (path for name in splits or names for path in _walk(root, f"{name}/", depth=1))
    return Tree(
        root.resolve().name,
        str(root),
        [*(f"{name}/" for name in names), *below],
        lambda files, labels: FileSplit([root / file for file in files], labels),
    )


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
        raise UserError(what, str(error.filename), "check its permissions") from error


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

    def key(self, index: int) -> str:
        """Return the file name: a folder and its tar are the same data."""
        return posixpath.basename(self.members[index].path)

    def take(self, chosen: Tensor) -> "TarSplit":
        """Return the members at these indices."""
        return TarSplit(self.archive, [self.members[index] for index in chosen.tolist()], self.labels[chosen])


def tar_tree(path: Path) -> tuple[Tree, str]:
    """Return the tree of a plain tar, and a note on its symbolic links and special files, which are not read.

    A single folder around everything is left out, unless it is a split. Raises UserError if the tar is damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            infos = tar.getmembers()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("it ends before its last block")  # tarfile takes a cut for the end
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        what = f"the archive can't be read: {str(error) or type(error).__name__}"
        raise UserError(what, str(path), "copy or download it again") from error
    named = {posixpath.normpath(info.name).lstrip("/"): info for info in infos}
    members = {
        name: Member(name, info.offset_data, info.size)
        for name, info in named.items()
        if info.isreg() and not info.issparse()
    }
    for name, info in named.items():
        if info.islnk() and (target := posixpath.normpath(info.linkname).lstrip("/")) in members:
            members[name] = members[target]._replace(path=name)
    links = [name for name, info in named.items() if not (name in members or info.isdir())]
    paths = [*members, *(f"{name}/" for name, info in named.items() if info.isdir() and name != ".")]
    while len(top := {name.partition("/")[0] for name in paths}) == 1 and not top & SPLIT_NAMES:
        prefix = f"{top.pop()}/"
        if prefix.rstrip("/") in members:
            break
        members = {name.removeprefix(prefix): member for name, member in members.items()}
        paths = [name.removeprefix(prefix) for name in paths if name != prefix]
    note = f"links and special files in the tar, not read: {len(links):,} ({some(links)})" if links else ""
    archive = str(path)
    tree = Tree(
        path.stem, archive, paths, lambda files, labels: TarSplit(archive, [members[name] for name in files], labels)
    )
    return tree, note


def read_tree(tree: Tree, data: DataConfig, *notes: str) -> Source:
    """Read the splits of a tree.

    Raises UserError if the layout is another, a class has no image in a split, or a split has a class that train lacks.
    """
    folders, others = tree.folders(), list[str]()
    if _is_classes(tree, folders, data):
        splits = {"train": _split(tree, "", folders, others)}
        return assemble(tree.name, folders, splits, data, [*_note(others), *notes])
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
    return assemble(tree.name, classes, splits, data, [*_note(others), *notes])


def _is_classes(tree: Tree, folders: list[str], data: DataConfig) -> bool:
    """Return whether the folders are classes: several, no split names, and each with images directly in it."""
    if len(folders) < 2 or SPLIT_NAMES & set(folders) or data.train_split or data.val_split:
        return False
    return all(any(map(is_image, tree.loose(folder))) for folder in folders)


def _no_folder(tree: Tree, name: str, folders: list[str]) -> UserError:
    found = ", ".join(folders[:6]) or "nothing"
    tip = "lay it out as train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE alone, of which a tenth is held out"
    if name == "val" and folders:
        tip += "; another name: --val-split NAME"
    return UserError(f"'{tree.where}' has no folder {name}/ (found: {found})", WHERE, tip)


def _split(tree: Tree, folder: str, classes: list[str], others: list[str]) -> LazySplit:
    """Read the class folders of a split; add the other files to `others`."""
    where = f"{tree.where}/{folder}".rstrip("/")
    found, here = tree.folders(folder), f"{folder}/" if folder else tree.where
    if unknown := sorted(set(found) - set(classes)):
        what = f"class '{unknown[0]}' of {here} is not in train/ ({len(unknown)} such)"
        raise UserError(what, where, "give every split the same class folders")
    others += tree.loose(folder) if folder else []
    images: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = tree.files(f"{folder}/{name}".lstrip("/"))
        class_images = [file for file in files if is_image(file)]
        others += (file for file in files if not is_image(file))
        if not class_images:
            raise UserError(
                f"class '{name}' has no images in {here}",
                f"{where}/{name}",
                f"add images ({', '.join(SUFFIXES[:3])}, ...) or remove the class from every split",
            )
        images += class_images
        labels += [label] * len(class_images)
    return tree.make_split(images, torch.tensor(labels))


def _note(others: list[str]) -> list[str]:
    """Return a note on the files that are not images by name or not in class folders."""
    if not others:
        return []
    count = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    return [f"{count} not read, being no image by name or in no class folder: {some(others)}"]
