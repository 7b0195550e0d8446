"""Sources of labelled images, by name or path."""

import os
from pathlib import Path

from pdvit.config.schema import DataConfig
from pdvit.data.source_types import SOURCE_TYPES, source_type
from pdvit.data.sources.digits import read_digits
from pdvit.data.sources.folder import folder_tree, list_images, read_tree, tar_tree
from pdvit.data.sources.split import ArraySplit, FileSplit, LazySplit, Source, Split, as_file_name, subsample
from pdvit.data.sources.table import read_csv
from pdvit.data.sources.timm_sets import read_hub, read_torchvision
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
    "subsample",
]

WHERE = "data.source (--data)"


def open_source(data: DataConfig) -> Source:
    """Open a source by name or path.

    Raises UserError if the name is unknown, a file or package is missing, or the layout is wrong.
    """
    name, path = source_type(data.source), _path(data)
    if os.path.isdir(path) and name in (None, "tar", "csv"):  # os.path, because Path raises for long names
        name = "folder"
    if name in ("tar", "csv") and not os.path.isfile(path):
        raise UserError(f"there is no file '{data.source}'", WHERE, "check the path")
    match name:
        case "digits":
            return read_digits(data)
        case "folder":
            return read_tree(folder_tree(path, data), data)
        case "tar":
            tree, note = tar_tree(path)
            return read_tree(tree, data, note)
        case "csv":
            return read_csv(path, data)
        case "torch":
            return read_torchvision(data)
        case "hfds":
            return read_hub(data)
        case "scenes":
            what = "digit scenes have classes of pixels, not of images"
            raise UserError(what, WHERE, "use pdvit segment, or --data digits")
    raise _unknown(data.source, path)


def _unknown(source: str, path: Path) -> UserError:
    lower = source.lower()
    if lower.endswith((".zip", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")):
        return UserError(f"'{source}' can't be read by index", WHERE, "unpack it, or make a plain .tar of it")
    if lower.startswith(("wds/", "hfids/", "tfds/")):
        tip = "load it with the package datasets: docs/data.md, Shards and streams"
        return UserError(f"'{source}' is a stream, which can't be read by index", WHERE, tip)
    is_path = os.sep in source or os.path.exists(path)
    what = "there is no folder, tar or table" if is_path else "there is no source named"
    tip = closest(source, [item.pattern for item in SOURCE_TYPES if item.pattern.islower()])
    return UserError(f"{what} '{source}'", WHERE, f"{tip} (--data help lists the source types)")


def source_label(data: DataConfig) -> str:
    """Return a short name of the source for the name of a run."""
    path = _path(data).resolve()
    name = path.stem if source_type(data.source) in ("tar", "csv") else path.name
    return as_file_name(name) or "data"


def _path(data: DataConfig) -> Path:
    return Path(os.path.expanduser(data.source))
