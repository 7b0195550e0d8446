"""Sources of labelled images, by name or path. Imports no torch before a source is opened: `--data help` is instant."""

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from pdvit.errors import printable

WHERE = "data.source (--data)"


class SourceType(NamedTuple):
    """A type of source; its reader returns the `Source` of a `DataConfig`, for training or as it is."""

    pattern: str
    glob: str | None  # that identifies it
    reader: str | None  # `module.function` in this package; masks have `open_masks`
    settings: tuple[str, ...]  # that have an effect
    help: str


SPLITS = ("train_split", "val_split")
SETTINGS = ("root", *SPLITS, "input_key", "target_key", "download")
TORCHVISION = ("root", *SPLITS, "download")
FOLDERS = "train/CLASS/IMAGE with val/, validation/ or test/; or CLASS/IMAGE alone"
SCENES = "handwritten numbers on textured grounds, with labelled pixels, built in (pdvit segment)"
TORCH, HUB = "data sets of torchvision, in --data-dir", "data sets of Hugging Face (extra hf-data)"
DIGITS = "scikit-learn's 1,797 digits, built in; some: digits:0-4"
CSV = "a table with the columns path, label and optionally split"
SOURCE_TYPES = {
    "digits": SourceType("digits", "digits:*", "digits.read_digits", (), DIGITS),
    "scenes": SourceType("scenes", None, None, (), SCENES),
    "folder": SourceType("FOLDER", None, "folder.read_folder", SPLITS, FOLDERS),
    "tar": SourceType("FILE.tar", "*.tar", "folder.read_tar", SPLITS, "the same in a plain tar, read in place"),
    "csv": SourceType("FILE.csv", "*.csv", "table.read_csv", SPLITS, CSV),
    "torch": SourceType("torch/cifar100", "torch/*", "timm_sets.read_torchvision", TORCHVISION, TORCH),
    "hfds": SourceType("hfds/OWNER/NAME", "hfds/*", "timm_sets.read_hub", SETTINGS, HUB),
}
FILE_TYPES = [name for name, item in SOURCE_TYPES.items() if item.pattern.startswith("FILE")]


def source_type(source: str) -> str | None:
    """Return the name of the type that the text alone identifies; None for a path to be looked up, or unknown."""
    for name, item in SOURCE_TYPES.items():
        if source.lower() == item.pattern or (item.glob and fnmatchcase(source.lower(), item.glob)):
            return name
    return None


def list_source_types() -> str:
    """Return the text of `--data help`."""
    width = max(len(item.pattern) for item in SOURCE_TYPES.values())
    lines = (f"  {item.pattern:{width}}  {item.help}" for item in SOURCE_TYPES.values())
    return "\n".join(["--data accepts:", *lines, "docs/data.md has more"])


def absolute_path(source: str) -> str:
    """Return a source with its path, if any, made absolute, so that it is found from any folder."""
    name = source_type(source)
    prefix = source[: len("hfds/")] if name == "hfds" else ""
    path = os.path.expanduser(source.removeprefix(prefix))
    is_path = name in (None, "hfds", *FILE_TYPES) and os.path.exists(path)
    return prefix + os.path.abspath(path) if is_path else source


def run_name(source: str, label: str) -> str:
    """Return the default name of a run on a source: letters of any script, digits and ._=%- only."""
    path = Path(os.path.expanduser(source)).resolve()
    name = path.stem if source_type(source) in FILE_TYPES else path.name
    return re.sub(r"[^\w.=%-]", "-", f"{name or 'data'}-{label}")


def first_names(names: list[str], count: int = 5) -> str:
    """Return the first names of a list, printable."""
    return printable(", ".join(names[:count]) + (", ..." if len(names) > count else ""))
