"""Images as SPLIT/CLASS/IMAGE or CLASS/IMAGE alone, on the disk or in a plain tar; hidden files are skipped."""

import io
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pdvit.config.schema import DataConfig
from pdvit.data.sources import WHERE, first_names
from pdvit.data.sources.split import (
    SPLIT_NAMES,
    TEST_NAMES,
    FileSplit,
    Source,
    Split,
    assemble,
    choose_splits,
    open_image,
)
from pdvit.errors import UserError
from pdvit.files import reading

MakeSplit = Callable[[list[str], Tensor], Split]  # of paths and labels
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MASKS = ("masks", "annotations", "labels")  # folders beside images
LAYOUT = "lay it out as train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE alone; other names: --val-split NAME"


def is_image(name: str) -> bool:
    """Return whether the suffix is that of an image, and the file is not hidden."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith(".")


def read_folder(data: DataConfig, training: bool = True) -> Source:
    """Read a folder on the disk, of its split folders if it has any; raises UserError."""
    root = Path(os.path.expanduser(data.source))
    names = folder_names(root)
    splits = [name for name in names if name in {*SPLIT_NAMES, data.train_split, data.val_split}]
    below = (path for name in splits or names for path in _walk(root, f"{name}/", depth=1))
    files = (entry.name for entry in _entries(root) if entry.name not in names)
    paths = [*(f"{name}/" for name in names), *files, *below]

    def make_split(files: list[str], labels: Tensor) -> Split:
        return FileSplit([root / file for file in files], labels)

    return read_tree(root.resolve().name, str(root), paths, make_split, data, training)


def folder_names(root: Path) -> list[str]:
    """Return the names of the folders in a folder, in order; raises UserError."""
    return sorted(entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith("."))


def list_images(folder: Path, others: list[str] | None = None) -> list[Path]:
    """Return the image files below a folder, folder by folder; what is not read goes to `others`. Raises UserError."""
    files = sorted(path.split("/") for path in _walk(folder, depth=2) if not path.endswith("/"))
    if others is not None:
        others += ["/".join(parts) for parts in files if not is_image(parts[-1])]
    return [folder.joinpath(*parts) for parts in files if is_image(parts[-1])]


def not_read(others: list[str]) -> str:
    """Return a note on files and hidden folders that are not read, empty if there are none."""
    count = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    reasons = "hidden, no suffix of an image, or in no class folder"
    return f"{count} not read ({reasons}): {first_names(others)}" if others else ""


def _walk(root: Path, below: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the paths below a folder; links are followed to split and class folders, hidden folders are files."""
    for entry in _entries(root / below):
        path = f"{below}{entry.name}"
        if entry.is_dir(follow_symlinks=depth < 2) and not entry.name.startswith("."):
            yield f"{path}/"
            yield from _walk(root, f"{path}/", depth + 1)
        else:
            yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with reading(folder, "check its path and permissions", "the folder can't be read"), os.scandir(folder) as entries:
        return list(entries)


@dataclass(frozen=True)
class TarSplit(FileSplit):
    """A split of members of a plain tar, whose paths begin with that of the tar."""

    archive: Path
    spans: list[tuple[int, int]]  # offset and number of the bytes of each member

    def open(self, index: int) -> Image.Image:
        """Open a member as an image; raises EOFError if the tar is cut off."""
        offset, size = self.spans[index]
        with open(self.archive, "rb") as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise EOFError("the archive ends in the middle of it")
        return open_image(io.BytesIO(content))


def read_tar(data: DataConfig, training: bool = True) -> Source:
    """Read a plain tar like a folder, without the folders around everything; raises UserError."""
    path = Path(os.path.expanduser(data.source))
    with reading(path, "copy or download it again", "the archive can't be read"), tarfile.open(path, "r:") as tar:
        members = []
        for info in tar:
            if info.size < 0:
                raise tarfile.ReadError("a file in it has a negative size")  # tarfile would read it for ever
            members.append((posixpath.normpath(info.name).lstrip("/"), info))
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError("it ends before its last block")  # tarfile takes a cut for the end
    infos = {name: info for name, info in members if "/." not in f"/{name}"}
    hidden = {re.sub(r"((?:^|/)\.[^/]*).*", r"\1", name) for name, _ in members if "/." in f"/{name}" and name != "."}
    again = [name for name, count in Counter(name for name, info in members if info.isreg()).items() if count > 1]
    files = {name: info for name, info in infos.items() if info.isreg() and not info.issparse()}
    for name, info in infos.items():
        if info.islnk() and (target := posixpath.normpath(info.linkname).lstrip("/")) in files:
            files[name] = files[target]
    links = [name for name, info in infos.items() if not (name in files or info.isdir())]
    note = f"links and special files in the tar, not read: {len(links):,} ({first_names(links)})" if links else ""
    twice = f"files that the tar has twice, read as the last: {len(again):,} ({first_names(again)})" if again else ""
    folders = [f"{name}/" for name, info in infos.items() if info.isdir()]
    common = posixpath.commonpath([posixpath.dirname(name) for name in files] or [""]).split("/")
    root = "".join(f"{folder}/" for folder in takewhile(lambda folder: folder and folder not in SPLIT_NAMES, common))
    paths = [name.removeprefix(root) for name in (*files, *folders, *hidden) if name.startswith(root) and name != root]

    def make_split(names: list[str], labels: Tensor) -> Split:
        infos = [files[root + name] for name in names]
        paths, spans = [path / root / name for name in names], [(info.offset_data, info.size) for info in infos]
        return TarSplit(paths, labels, path, spans)

    return read_tree(path.stem, str(path), paths, make_split, data, training).noting(note, twice)


def read_tree(
    name: str, root: str, paths: Iterable[str], make_split: MakeSplit, data: DataConfig, training: bool
) -> Source:
    """Read the splits of a tree, given the paths of its files and (with a final `/`) its folders; raises UserError."""
    tree = sorted(path.split("/") for path in paths)  # folder by folder, as pathlib does; resume depends on this order
    folders = {path[0] for path in tree if len(path) > 1}
    named = SPLIT_NAMES & folders or data.train_split or data.val_split
    with_images = {path[0] for path in tree if len(path) == 2 and is_image(path[1])}
    if not named and ({"leftImg8bit", "gtFine"} <= folders or ("images" in folders and folders & {*MASKS})):
        raise UserError(f"'{root}' has classes of pixels, not of images", WHERE, "use pdvit segment --data FOLDER")
    if not named and (not folders or (len(folders) > 1 and with_images == folders)):
        tree, chosen = [["", *path] for path in tree], {"train" if training else "all": ""}
    else:
        labelled = {path[0] for path in tree if len(path) > 2}
        chosen = choose_splits(sorted(folders - {*TEST_NAMES} | labelled), data, root, LAYOUT, training)
    files = {role: [path for path in tree if path[0] == folder] for role, folder in chosen.items()}
    classes = sorted({path[1] for split in files.values() for path in split if len(path) > 2})
    if not classes:
        place, loose = f"{root}/{next(iter(chosen.values()))}".rstrip("/"), sum(is_image(path[-1]) for path in tree)
        raise UserError(f"no class folders in '{place}' (loose images: {loose:,})", WHERE, LAYOUT)
    numbers = {label: number for number, label in enumerate(classes)}
    splits, others, alike = dict[str, Split](), list[str](), list[str]()
    for role, split in files.items():
        images = [path for path in split if len(path) > 2 and is_image(path[-1])]
        if empty := sorted(set(numbers) - {path[1] for path in images}):
            tip = f"add images ({', '.join(SUFFIXES[:3])}, ...) or remove the class from every split"
            raise UserError(f"class '{empty[0]}' has no images in {role}", posixpath.join(root, chosen[role]), tip)
        labels = torch.tensor([numbers[path[1]] for path in images])
        splits[role] = make_split([posixpath.join(*path) for path in images], labels)
        others += [posixpath.join(*path) for path in split if path[-1] and not (len(path) > 2 and is_image(path[-1]))]
        stems = Counter(os.path.splitext(posixpath.join(*path))[0] for path in images)
        alike += [stem for stem, count in stems.items() if count > 1]
    note = f"files with the same name but for the suffix: {len(alike):,} ({first_names(alike)})" if alike else ""
    return assemble(name, classes, splits, data, training).noting(note, not_read(others))
