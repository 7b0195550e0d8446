"""The types of sources, as `--data help` lists them; without torch, so that the list appears at once."""

import os
from dataclasses import fields
from typing import NamedTuple

from pdvit.config.schema import DataConfig


class SourceType(NamedTuple):
    """A type of source: its pattern in `--data`, the prefix or suffix that identifies it, and its settings."""

    name: str
    pattern: str
    prefix: str | None
    suffix: str | None
    settings: tuple[str, ...]
    help: str


SPLITS = ("train_split", "val_split")
SETTINGS = ("root", *SPLITS, "input_key", "target_key", "download")
TORCHVISION = ("root", *SPLITS, "download")
FOLDERS = "train/CLASS/IMAGE with val/, validation/ or test/; or CLASS/IMAGE alone"
SCENES = "handwritten numbers on textured grounds, with labelled pixels, built in (pdvit segment)"
SOURCE_TYPES = (
    SourceType("digits", "digits", "digits:", None, (), "scikit-learn's 1,797 digits, built in; some: digits:0-4"),
    SourceType("scenes", "scenes", None, None, (), SCENES),
    SourceType("folder", "FOLDER", None, None, SPLITS, FOLDERS),
    SourceType("tar", "FILE.tar", None, ".tar", SPLITS, "the same in a plain tar, read in place"),
    SourceType("csv", "FILE.csv", None, ".csv", SPLITS, "a table with the columns path, label and optionally split"),
    SourceType("torch", "torch/cifar100", "torch/", None, TORCHVISION, "data sets of torchvision, in --data-dir"),
    SourceType("hfds", "hfds/OWNER/NAME", "hfds/", None, SETTINGS, "data sets of Hugging Face (extra hf-data)"),
)


def source_type(source: str) -> str | None:
    """Return the name of the type that the text alone identifies; None for a path to be looked up, or unknown."""
    lower = source.lower()
    for item in SOURCE_TYPES:
        prefixed = item.prefix is not None and lower.startswith(item.prefix)
        if source == item.pattern or prefixed or (item.suffix is not None and lower.endswith(item.suffix)):
            return item.name
    return None


def unused_source_settings(data: DataConfig) -> list[str]:
    """Return a note for each changed setting of sources that has no effect on this one."""
    name = source_type(data.source) or "folder"
    (used,) = (item.settings for item in SOURCE_TYPES if item.name == name)
    changed = [item.name for item in fields(data) if getattr(data, item.name) != item.default]
    return [
        f"data.{setting} = {getattr(data, setting)} has no effect: '{data.source}' does not have it"
        for setting in changed
        if setting in SETTINGS and setting not in used
    ]


def absolute_path(source: str) -> str:
    """Return a source with its path, if any, made absolute, so that it is found from any folder."""
    name, prefix = source_type(source), ""
    if name == "hfds":
        prefix = source[: len("hfds/")]
    elif name not in (None, "tar", "csv"):
        return source
    path = os.path.expanduser(source.removeprefix(prefix))
    return prefix + os.path.abspath(path) if os.path.exists(path) else source


def list_source_types() -> str:
    """Return the text of `--data help`."""
    width = max(len(item.pattern) for item in SOURCE_TYPES)
    lines = (f"  {item.pattern:{width}}  {item.help}" for item in SOURCE_TYPES)
    return "\n".join(["--data accepts:", *lines, "docs/data.md has more"])
