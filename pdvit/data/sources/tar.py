"""Plain tar files read in place: each member by its offset."""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources.holdout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES
from pdvit.data.sources.layout import read_layout
from pdvit.data.sources.split import LazySplit, Source, some
from pdvit.data.sources.tree import Tree, in_order
from pdvit.errors import UserError

# A larger member is not an image, and reading it would fill the memory.
MAX_MEMBER_BYTES = 2**30
# Split folders, which stay when one of them is the only folder at the top.
SPLIT_NAMES = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}
BLOCK = 512  # of a tar file


@dataclass(frozen=True)
class Member:
    """A file in a tar: its path, the offset of its bytes and their number."""

    archive: str
    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes; raises OSError, ValueError or EOFError if the tar is damaged."""
        if self.size >= MAX_MEMBER_BYTES:
            raise ValueError(f"{self.size:,} bytes, too large for an image")
        content = _bytes_at(self.archive, self.offset, self.size)
        if len(content) < self.size:
            raise EOFError("the archive ends in the middle of it")
        return content


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


class TarTree(Tree):
    """The members of a tar as a tree, without a single folder around everything."""

    def __init__(self, path: Path, members: Mapping[str, Member]) -> None:
        self.where, self.name = str(path), path.stem
        self.members = dict(members)
        while len(top := {file.partition("/")[:2] for file in self.members}) == 1:
            ((name, slash),) = top
            if not slash or name in SPLIT_NAMES:
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


def read_tar(path: Path, data: DataConfig) -> Source:
    """Read a source from a plain tar; UserError if it is damaged, compressed or laid out otherwise."""
    dropped: list[str] = []
    members = tar_members(path, dropped)
    # macOS adds this folder; its files have the names of the images.
    members = {file: member for file, member in members.items() if not file.startswith("__MACOSX/")}
    note = f"links without a file in the tar, not read: {len(dropped):,} ({some(dropped)})"
    try:
        return read_layout(TarTree(path, members), data).noting(note if dropped else "")
    except UserError as error:
        if not dropped:
            raise
        raise UserError(f"{error.what}; {note}", error.where, error.tip) from error


def tar_members(path: Path, dropped: list[str]) -> dict[str, Member]:
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
    dropped += (file for file in links if file not in linked)
    return found | linked


def _end(file: str, links: Mapping[str, str]) -> str:
    """Return where a link leads, over others; a link where they lead in a circle."""
    seen = set[str]()
    while file in links and file not in seen:
        seen.add(file)
        file = links[file]
    return file


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Name the damaged tar and the damage."""
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"the archive can't be read: {reason}", str(path), "copy or download it again")
