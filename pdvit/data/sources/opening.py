"""The one way to open a source of labelled images."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from pdvit.config.schema import DataConfig
from pdvit.data.sources import SOURCE_TYPES, WHERE, source_type
from pdvit.data.sources.digits import read_digits
from pdvit.data.sources.folder import read_folder, read_tar
from pdvit.data.sources.split import Source
from pdvit.data.sources.table import read_csv
from pdvit.data.sources.timm_sets import read_hub, read_torchvision
from pdvit.errors import UserError, closest

# Compressed archives, shards and streams: neither is read by index.
UNREADABLE = ("*.zip", "*.tgz", "*.txz", "*.tar.gz", "*.tar.xz", "*.tar.bz2", "wds/*", "hfids/*", "tfds/*")


def open_source(data: DataConfig) -> Source:
    """Open a source by name or path.

    Raises UserError if the name is unknown, a file or package is missing, or the layout is wrong.
    """
    source, name, path = data.source, source_type(data.source), Path(os.path.expanduser(data.source))
    if os.path.isdir(path) and name in (None, "tar", "csv"):  # os.path, because Path raises for long names
        name = "folder"
    if name in ("tar", "csv") and not os.path.isfile(path):
        raise UserError(f"there is no file '{source}'", WHERE, "check the path")
    match name:
        case "digits":
            return read_digits(data)
        case "folder":
            return read_folder(path, data)
        case "tar":
            return read_tar(path, data)
        case "csv":
            return read_csv(path, data)
        case "torch":
            return read_torchvision(data)
        case "hfds":
            return read_hub(data)
        case "scenes":
            what = "digit scenes have classes of pixels, not of images"
            raise UserError(what, WHERE, "use pdvit segment, or --data digits")
    if any(fnmatchcase(source.lower(), glob) for glob in UNREADABLE):
        tip = "unpack it, make a plain .tar of it, or load it with the package datasets: docs/data.md"
        raise UserError(f"'{source}' can't be read by index", WHERE, tip)
    tip = closest(source, [item.pattern for item in SOURCE_TYPES if item.pattern.islower()])
    what = f"there is no source, folder or table '{source}'"
    raise UserError(what, WHERE, f"{tip} (--data help lists the source types)")
