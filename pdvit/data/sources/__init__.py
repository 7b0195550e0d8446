"""Sources: where labelled images come from, by name or path; one reader for each kind."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pdvit.config.schema import DataConfig
from pdvit.data.kinds import KINDS, kind_of
from pdvit.data.sources.digits import read_digits
from pdvit.data.sources.layout import read_layout
from pdvit.data.sources.split import ArraySplit, FileSplit, LazySplit, Source, Split, as_file_name
from pdvit.data.sources.table import read_csv
from pdvit.data.sources.tar import read_tar
from pdvit.data.sources.timm_sets import read_hub, read_torchvision
from pdvit.data.sources.tree import FolderTree, list_images
from pdvit.errors import UserError, closest

__all__ = [
    "ArraySplit",
    "FileSplit",
    "LazySplit",
    "Source",
    "Split",
    "as_file_name",
    "list_images",
    "open_source",
    "source_label",
]

NOT_BY_INDEX = (".zip", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
READERS: dict[str, Callable[[DataConfig], Source]] = {
    "digits": lambda data: read_digits(data),
    "scenes": lambda data: _no_classes(),
    "folder": lambda data: read_layout(FolderTree(_path(data)), data),
    "tar": lambda data: read_tar(_path(data), data),
    "csv": lambda data: read_csv(_path(data), data),
    "torch": lambda data: read_torchvision(data),
    "hfds": lambda data: read_hub(data),
}


def open_source(data: DataConfig) -> Source:
    """Open a source by name or path.

    Raises UserError if the name is unknown, a file or package is missing, or the layout is another.
    """
    kind, path = kind_of(data.source), _path(data)
    if os.path.isdir(path) and kind in (None, "tar", "csv"):  # of os.path, as Path's own raises for long names
        kind = "folder"
    if kind in ("tar", "csv") and not os.path.isfile(path):
        raise UserError(f"there is no file '{data.source}'", "data.source (--data)", "check the path")
    if kind is None and data.source.lower().endswith(NOT_BY_INDEX):
        what = f"'{data.source}' can't be read by index"
        raise UserError(what, "data.source (--data)", "unpack it, or make a plain .tar of it")
    if kind is None and data.source.lower().startswith(("wds/", "hfids/", "tfds/")):
        what = f"'{data.source}' is a stream, which can't be read by index"
        raise UserError(
            what, "data.source (--data)", "load it with the package datasets: docs/data.md, Shards and streams"
        )
    if kind is None:
        looks_like_path = os.sep in data.source or os.path.exists(path)
        what = "there is no folder, tar or table" if looks_like_path else "there is no source named"
        tip = closest(data.source, [kind.written for kind in KINDS if kind.written.islower()])
        raise UserError(f"{what} '{data.source}'", "data.source (--data)", f"{tip} (--data help lists all kinds)")
    return READERS[kind](data)


def _no_classes() -> NoReturn:
    what = "digit scenes have classes of pixels, not of images"
    raise UserError(what, "data.source (--data)", "use pdvit segment, or --data digits")


def source_label(data: DataConfig) -> str:
    """Return a short name of the source, fit for a run's name."""
    path = _path(data).resolve()
    name = path.stem if kind_of(data.source) in ("tar", "csv") else path.name
    return as_file_name(name) or "data"


def _path(data: DataConfig) -> Path:
    return Path(os.path.expanduser(data.source))
