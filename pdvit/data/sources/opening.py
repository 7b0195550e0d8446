"""The one way to open a source of labelled images."""

import os
from pathlib import Path

from pdvit.config.schema import DataConfig
from pdvit.data.sources import SOURCE_TYPES, WHERE, source_type
from pdvit.data.sources.digits import read_digits
from pdvit.data.sources.folder import read_folder, read_tar
from pdvit.data.sources.split import Source
from pdvit.data.sources.table import read_csv
from pdvit.data.sources.timm_sets import read_hub, read_torchvision
from pdvit.errors import UserError, closest


def open_source(data: DataConfig) -> Source:
    """Open a source by name or path.

    Raises UserError if the name is unknown, a file or package is missing, or the layout is wrong.
    """
    name, path = source_type(data.source), Path(os.path.expanduser(data.source))
    if os.path.isdir(path) and name in (None, "tar", "csv"):  # os.path, because Path raises for long names
        name = "folder"
    if name == "scenes":
        what = "digit scenes have classes of pixels, not of images"
        raise UserError(what, WHERE, "use pdvit segment, or --data digits")
    if name in ("tar", "csv") and not os.path.isfile(path):
        raise UserError(f"there is no file '{data.source}'", WHERE, "check the path")
    if name is None or (name == "folder" and not os.path.isdir(path)):
        tip = closest(data.source, [item.pattern for item in SOURCE_TYPES if item.pattern.islower()])
        tip += " (--data help lists the source types; for compressed archives, shards and streams see docs/data.md)"
        raise UserError(f"'{data.source}' is no source, folder or table of images", WHERE, tip)
    by_name = {"digits": read_digits, "torch": read_torchvision, "hfds": read_hub}
    by_path = {"folder": read_folder, "tar": read_tar, "csv": read_csv}
    return by_path[name](path, data) if name in by_path else by_name[name](data)
