"""Sources: where labelled images come from, by name or path; one reader for each kind."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pdvit.config.schema import DataConfig
from pdvit.data.kinds import KINDS, kind_of
from pdvit.data.sources.archive import archive_name, read_archive
from pdvit.data.sources.cache import Say, say_on_stderr
from pdvit.data.sources.digits import read_digits
from pdvit.data.sources.layout import read_layout
from pdvit.data.sources.shards import read_shards
from pdvit.data.sources.split import ArraySplit, FileSplit, LazySplit, Source, Split, as_file_name
from pdvit.data.sources.streams import read_stream
from pdvit.data.sources.table import read_csv
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

READERS: dict[str, Callable[[DataConfig, Say], Source]] = {
    "digits": lambda data, say: read_digits(data),
    "scenes": lambda data, say: _no_classes(),
    "folder": lambda data, say: read_layout(FolderTree(_path(data)), data),
    "archive": lambda data, say: read_archive(_path(data), data, say),
    "csv": lambda data, say: read_csv(_path(data), data),
    "torch": lambda data, say: read_torchvision(data),
    "hfds": lambda data, say: read_hub(data),
    "hfids": read_stream,
    "wds": read_shards,
    "tfds": read_stream,
}


def open_source(data: DataConfig, say: Say = say_on_stderr) -> Source:
    """Open a source by name or path; `say` hears of what takes long.

    Raises:
        UserError: the name is unknown, a file or package is missing, or the data are not laid out as the source's kind
            wants them.
    """
    kind, path = kind_of(data.source), _path(data)
    if os.path.isdir(path) and kind in (None, "archive", "csv"):  # of os.path, as Path's own raises for long names
        kind = "folder"
    if kind in ("archive", "csv") and not os.path.isfile(path):
        raise UserError(f"there is no file '{data.source}'", "data.source (--data)", "check the path")
    if kind is None:
        looks_like_path = os.sep in data.source or os.path.exists(path)
        what = "there is no folder, archive or table" if looks_like_path else "there is no source named"
        tip = closest(data.source, [kind.written for kind in KINDS if kind.written.islower()])
        raise UserError(f"{what} '{data.source}'", "data.source (--data)", f"{tip} (--data help lists all kinds)")
    return READERS[kind](data, say)


def _no_classes() -> NoReturn:
    what = "digit scenes have classes of pixels, not of images"
    raise UserError(what, "data.source (--data)", "use pdvit segment, or --data digits")


def source_label(data: DataConfig) -> str:
    """Return a short name of the source, fit for a run's name."""
    path = _path(data).resolve()
    name = path.name if kind_of(data.source) not in ("archive", "csv") else archive_name(path.name)
    return as_file_name(name) or "data"


def _path(data: DataConfig) -> Path:
    return Path(os.path.expanduser(data.source))
