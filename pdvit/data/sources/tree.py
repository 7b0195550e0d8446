"""Files below a folder, on the disk or in an archive: what the layouts of class folders are read from."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from pdvit.data.sources.split import FileSplit, LazySplit
from pdvit.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Tree(ABC):
    """Folders and files by their path below a root, parts joined by `/`; hidden folders are passed over."""

    name: str
    where: str

    @abstractmethod
    def folders(self, folder: str = "") -> list[str]:
        """Return the names of the folders in a folder, in order."""

    @abstractmethod
    def loose(self, folder: str = "") -> list[str]:
        """Return the paths of the files directly in a folder, in order."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder, in a fixed order."""

    @abstractmethod
    def read(self, file: str) -> bytes:
        """Return what is in a file."""

    @abstractmethod
    def split(self, files: list[str], labels: Tensor) -> LazySplit:
        """Return files as the images of a split, with their class indices `(N,)`."""


def is_image(name: str) -> bool:
    """Tell an image by its suffix."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def in_order(paths: Iterable[str]) -> list[str]:
    """Sort paths folder by folder, as `pathlib` does: its order is part of what a run is resumed with."""
    return sorted(paths, key=lambda path: path.split("/"))


class FolderTree(Tree):
    """A folder on the disk."""

    def __init__(self, root: Path) -> None:
        self.root, self.where, self.name = root, str(root), root.resolve().name

    def folders(self, folder: str = "") -> list[str]:
        """Return the names of the folders in a folder; UserError where it can't be read."""
        return sorted(item.name for item in self._items(folder) if item.is_dir())

    def loose(self, folder: str = "") -> list[str]:
        """Return the paths of the files directly in a folder."""
        return in_order(os.path.join(folder, item.name) for item in self._items(folder) if not item.is_dir())

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder; links to folders are not followed, and count as files."""
        found: list[str] = []
        for here, folders, names in os.walk(self.root / folder, onerror=_unreadable):
            links = [name for name in folders if os.path.islink(os.path.join(here, name))]
            below = os.path.relpath(here, self.root)
            found += (os.path.join(below, name) for name in [*names, *links])
        return in_order(found)

    def read(self, file: str) -> bytes:
        """Return what is in a file."""
        return (self.root / file).read_bytes()

    def split(self, files: list[str], labels: Tensor) -> FileSplit:
        """Return files as the images of a split."""
        return FileSplit([self.root / file for file in files], labels)

    def _items(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / folder) as items:
                return [item for item in items if not item.name.startswith(".")]
        except OSError as error:
            _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    what = f"the folder can't be read: {error.strerror}"
    raise UserError(what, str(error.filename), "check its permissions") from error


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder in a fixed order, told by their suffix."""
    return [folder / file for file in FolderTree(folder).files("") if is_image(file)]
