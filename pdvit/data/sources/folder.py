"""Images as SPLIT/CLASS/IMAGE or CLASS/IMAGE alone, on the disk or in a plain tar; hidden files are skipped."""

import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources import WHERE, first_names
from pdvit.data.sources.split import (
    SPLIT_NAMES,
    TEST_NAMES,
    FileSplit,
    LazySplit,
    Source,
    assemble,
    choose_splits,
    missing_split,
)
from pdvit.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "lay it out as train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE alone, of which a tenth is held out"


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

    return read_tree(root.resolve().name, str(root), paths, make_split, data)


def folder_names(root: Path) -> list[str]:
    """Return the names of the folders in a folder, in order; raises UserError."""
    return sorted(entry.name for entry in _entries(root) if entry.is_dir())


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, folder by folder; raises UserError if a folder can't be read."""
    files = sorted(path.split("/") for path in _walk(folder, depth=2) if is_image(path))
    return [folder.joinpath(*parts) for parts in files]


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
            return [entry for entry in entries if not entry.name.startswith(".")]
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

    Folders around everything are left out. Raises UserError if the tar is damaged.
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
    infos = {name: info for name, info in infos.items() if not f"/{name}".count("/.")}
    files = {name: info for name, info in infos.items() if info.isreg() and not info.issparse()}
    for name, info in infos.items():
        if info.islnk() and (target := posixpath.normpath(info.linkname).lstrip("/")) in files:
            files[name] = files[target]
    links = [name for name, info in infos.items() if not (name in files or info.isdir())]
    note = f"links and special files in the tar, not read: {len(links):,} ({first_names(links)})" if links else ""
    folders = [f"{name}/" for name, info in infos.items() if info.isdir()]
    common = posixpath.commonpath([posixpath.dirname(name) for name in files] or [""]).split("/")
    root = "".join(f"{folder}/" for folder in takewhile(lambda folder: folder and folder not in SPLIT_NAMES, common))
    paths = [name.removeprefix(root) for name in (*files, *folders) if name.startswith(root) and name != root]

    def make_split(names: list[str], labels: Tensor) -> LazySplit:
        members = ((root + name, files[root + name]) for name in names)
        return TarSplit(str(path), [Member(name, info.offset_data, info.size) for name, info in members], labels)

    return read_tree(path.stem, str(path), paths, make_split, data).noting(note)


def read_tree(
    name: str, root: str, paths: Iterable[str], make_split: Callable[[list[str], Tensor], LazySplit], data: DataConfig
) -> Source:
    """Read the splits of a tree, given the paths of its files and (with a final `/`) of its folders.

    Raises UserError if the layout is another, a class has no image in a split, or a split has a class that train lacks.
    """
    tree, chosen = _layout(root, paths, data)
    files = {role: [path for path in tree if path[0] == folder] for role, folder in chosen.items()}
    classes = {role: sorted({path[1] for path in split if len(path) > 2}) for role, split in files.items()}
    numbers = {label: number for number, label in enumerate(classes["train"])}
    if not numbers:
        what = f"no class folders in '{root}/{chosen['train']}'"
        raise UserError(what, WHERE, f"expected {chosen['train']}/CLASS/IMAGE")
    splits, others = dict[str, LazySplit](), list[str]()
    for role, split in files.items():
        where = posixpath.join(root, chosen[role])
        if unknown := [label for label in classes[role] if label not in numbers]:
            what = f"class '{unknown[0]}' of {role} is not in train ({len(unknown)} such)"
            raise UserError(what, where, "give every split the same class folders")
        images = [path for path in split if len(path) > 2 and is_image(path[-1])]
        if empty := sorted(set(numbers) - {path[1] for path in images}):
            tip = f"add images ({', '.join(SUFFIXES[:3])}, ...) or remove the class from every split"
            raise UserError(f"class '{empty[0]}' has no images in {role}", f"{where}/{empty[0]}", tip)
        labels = torch.tensor([numbers[path[1]] for path in images])
        splits[role] = make_split([posixpath.join(*path) for path in images], labels)
        others += [posixpath.join(*path) for path in split if path[-1] and not (len(path) > 2 and is_image(path[-1]))]
    count = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    note = f"{count} not read, being no image by name or in no class folder: {first_names(others)}"
    return assemble(name, list(numbers), splits, data, [note] if others else [])


def _layout(root: str, paths: Iterable[str], data: DataConfig) -> tuple[list[list[str]], dict[str, str]]:
    """Return the parts of the paths, each with its split first, and the split of each role; raises UserError."""
    tree = sorted(path.split("/") for path in paths)  # folder by folder, as pathlib does; resume depends on this order
    folders = sorted({path[0] for path in tree if len(path) > 1})
    named = SPLIT_NAMES & set(folders) or data.train_split or data.val_split
    with_images = {path[0] for path in tree if len(path) == 2 and is_image(path[1])}
    if len(folders) > 1 and not named and with_images == set(folders):  # CLASS/IMAGE alone
        return [["", *path] for path in tree], {"train": ""}
    labelled = {path[0] for path in tree if len(path) > 2}
    folders = [name for name in folders if name not in TEST_NAMES or name in labelled]
    chosen = choose_splits(folders, data)
    if missing := missing_split(chosen, folders):
        tip = LAYOUT + ("; another name: --val-split NAME" if missing == "val" and folders else "")
        found = first_names(folders) or "nothing"
        raise UserError(f"'{root}' has no folder {missing}/ (found: {found})", WHERE, tip)
    return tree, chosen
