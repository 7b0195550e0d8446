"""Archives read in place: members of a tar by their offsets, of a zip by their names."""

import bz2
import gzip
import io
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources.cache import Say, cached
from pdvit.data.sources.holdout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES
from pdvit.data.sources.imagenet import IMAGES
from pdvit.data.sources.layout import read_layout
from pdvit.data.sources.split import LazySplit, Source, some
from pdvit.data.sources.tree import Tree, in_order
from pdvit.errors import UserError

# A member above this is no image that anybody trains on, and would be unpacked to memory.
MOST_BYTES = 2**30
# What is not passed through where it is the only folder at the top.
KNOWN = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES, IMAGES.partition("/")[0]}
BLOCK = 512  # of a tar file
# How compressed files begin.
OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}


@dataclass(frozen=True)
class Member:
    """A file in an archive: its path in it, and in a tar where its bytes begin and how many they are."""

    archive: str
    path: str
    offset: int | None = None
    size: int = 0

    def read(self) -> bytes:
        """Return the bytes; raises OSError and what zipfile raises on damage."""
        if self.size >= MOST_BYTES:
            raise ValueError(f"{self.size:,} bytes are no image")
        if self.offset is None:
            return _zip(self.archive, os.getpid()).read(self.path)
        content = _bytes_at(self.archive, self.offset, self.size)
        if len(content) < self.size:
            raise EOFError("the archive ends in the middle of it")
        return content


@lru_cache(maxsize=16)
def _zip(archive: str, process: int) -> zipfile.ZipFile:
    """Return the open archive of a process: processes that share one would move its position under one another."""
    return zipfile.ZipFile(archive)


def _bytes_at(archive: str | Path, offset: int, size: int) -> bytes:
    """Return bytes of a file, fewer where it ends; opening it costs nothing beside decoding an image."""
    with open(archive, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


@dataclass(frozen=True)
class MemberSplit(LazySplit):
    """A split of members of archives."""

    members: list[Member]
    labels: Tensor

    def open(self, index: int) -> Image.Image:
        """Open a member as an image."""
        return Image.open(io.BytesIO(self.members[index].read()))

    def name(self, index: int) -> str:
        """Return archive and member."""
        return f"{self.members[index].archive}/{self.members[index].path}"

    def key(self, index: int) -> str:
        """Return the member's own name: a folder that was packed is the same data."""
        return self.members[index].path.rpartition("/")[2]

    def take(self, chosen: Tensor) -> "MemberSplit":
        """Return the members at these indices."""
        return MemberSplit([self.members[index] for index in chosen.tolist()], self.labels[chosen])


class ArchiveTree(Tree):
    """The members of an archive as a tree, without the single folder that everything may lie in."""

    def __init__(self, path: Path, members: Mapping[str, Member]) -> None:
        self.where, self.name = str(path), archive_name(path.name)
        self.members = dict(members)
        while len(top := {file.partition("/")[:2] for file in self.members}) == 1:
            ((name, slash),) = top
            if not slash or name in KNOWN:
                break
            prefix = f"{name}/"
            self.members = {file.removeprefix(prefix): member for file, member in self.members.items()}
        self.below: dict[str, tuple[set[str], list[str]]] = {}
        for file in in_order(self.members):
            self._enter(file)

    def folders(self, folder: str = "") -> list[str]:
        """Return the names of the folders in a folder."""
        return sorted(name for name in self._at(folder)[0] if not name.startswith("."))

    def loose(self, folder: str = "") -> list[str]:
        """Return the paths of the files directly in a folder."""
        return [file for file in self._at(folder)[1] if not file.rpartition("/")[2].startswith(".")]

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder."""
        folders, files = self._at(folder)
        below = [file for name in folders for file in self.files(f"{folder}/{name}".lstrip("/"))]
        return in_order([*files, *below])

    def read(self, file: str) -> bytes:
        """Return what is in a file."""
        return self.members[file].read()

    def split(self, files: list[str], labels: Tensor) -> MemberSplit:
        """Return members as the images of a split."""
        return MemberSplit([self.members[file] for file in files], labels)

    def _at(self, folder: str) -> tuple[set[str], list[str]]:
        return self.below.get(folder, (set(), []))

    def _enter(self, file: str) -> None:
        folder = file.rpartition("/")[0]
        self.below.setdefault(folder, (set(), []))[1].append(file)
        while folder:
            parent, _, name = folder.rpartition("/")
            known = self.below.setdefault(parent, (set(), []))[0]
            if name in known:
                return
            known.add(name)
            folder = parent


def read_archive(path: Path, data: DataConfig, say: Say) -> Source:
    """Read a source from a tar or zip archive; a compressed tar is first unpacked to a plain one in the cache.

    Raises UserError where the archive is damaged or has another layout.
    """
    dropped: list[str] = []
    members = zip_members(path) if path.name.lower().endswith(".zip") else tar_members(plain_tar(path, say), dropped)
    # macOS adds this folder to what it packs; its files have the names of the others, and are none of them
    members = {file: member for file, member in members.items() if not file.startswith("__MACOSX/")}
    lost = f"links that lead to no file in the archive, and are not read: {len(dropped):,} ({some(dropped)})"
    try:
        return read_layout(ArchiveTree(path, members), data).noting(lost if dropped else "")
    except UserError as error:
        if not dropped:
            raise
        raise UserError(f"{error.what}; {lost}", error.where, error.tip) from error


def archive_name(file: str) -> str:
    """Return an archive's name without its endings."""
    name, ending = os.path.splitext(file)
    return name.removesuffix(".tar") if ending.lower() in (".gz", ".xz", ".bz2") else name


def plain_tar(path: Path, say: Say) -> Path:
    """Return a tar that can be read at any place: a compressed one unpacked into the cache, once."""
    with open(path, "rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
    if opener is None:
        return path

    def unpack(target: Path) -> None:
        with opener(path) as packed, open(target, "wb") as plain:
            plain.writelines(_blocks(packed, path))

    say(f"{path.name} is compressed, so its images can't be read at random")
    return cached(path, ".tar", unpack, say)


def _blocks(packed: Any, path: Path) -> Iterator[bytes]:
    """Yield what is packed in a file, a mebibyte at a time; UserError where it is damaged, not where writing fails."""
    with _damage(path):
        while block := packed.read(2**20):
            yield block


def tar_members(path: Path, dropped: list[str] | None = None) -> dict[str, Member]:
    """Return the files of a plain tar by path, links followed; UserError where it is damaged or cut off.

    Links that lead to no file of the tar are added to `dropped`.
    """
    found: dict[str, Member] = {}
    links: dict[str, str] = {}
    with _damage(path), tarfile.open(path, "r:") as tar:
        for info in tar:
            file = posixpath.normpath(info.name).lstrip("/")
            if info.isreg() and not info.issparse():
                found[file] = Member(str(path), file, info.offset_data, info.size)
            elif info.islnk():
                links[file] = posixpath.normpath(info.linkname).lstrip("/")
            elif info.issym():
                links[file] = posixpath.normpath(posixpath.join(posixpath.dirname(file), info.linkname))
            elif info.issparse():
                raise tarfile.ReadError(f"{file} is stored as a sparse file, which pdvit does not read")
        end = _bytes_at(path, tar.offset, BLOCK)
    if end != bytes(BLOCK):  # what closes every tar; tarfile takes a cut between two members for the end
        raise _damaged(path, "it ends before its last block")
    linked = {file: replace(found[target], path=file) for file in links if (target := _end(file, links)) in found}
    if dropped is not None:
        dropped += (file for file in links if file not in linked)
    return found | linked


def _end(file: str, links: Mapping[str, str]) -> str:
    """Return where a link leads, over others; a link where they lead in a circle."""
    seen = set[str]()
    while file in links and file not in seen:
        seen.add(file)
        file = links[file]
    return file


def zip_members(path: Path) -> dict[str, Member]:
    """Return the files of a zip by path; UserError where it is damaged."""
    with _damage(path), zipfile.ZipFile(path) as packed:
        infos = [info for info in packed.infolist() if not info.is_dir()]
    return {posixpath.normpath(info.filename): Member(str(path), info.filename, None, info.file_size) for info in infos}


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say which archive is damaged, and how."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, OSError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"the archive can't be read: {reason}", str(path), "copy or download it again")
