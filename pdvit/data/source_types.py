"""The types of sources, as `--data help` lists them; without torch, so that the list appears at once."""

import os
from dataclasses import dataclass, fields

from pdvit.config.schema import DataConfig


@dataclass(frozen=True)
class SourceType:
    """A type of source: its pattern in `--data`, the prefix or suffixes that identify it, and its settings."""

    name: str
    pattern: str
    help: str
    prefix: str = ""
    suffixes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


SPLITS = ("train_split", "val_split")
SOURCE_SETTINGS = ("root", *SPLITS, "input_key", "target_key", "download")
SOURCE_TYPES = (
    SourceType("digits", "digits", "1,797 handwritten digits of scikit-learn, built in; some: digits:0-4", "digits:"),
    SourceType(
        "scenes", "scenes", "handwritten numbers on textured grounds, with labelled pixels, built in (pdvit segment)"
    ),
    SourceType(
        "folder", "FOLDER", "train/CLASS/IMAGE with val/, validation/ or test/; or CLASS/IMAGE alone", settings=SPLITS
    ),
    SourceType("tar", "FILE.tar", "the same in a plain tar, read in place", suffixes=(".tar",), settings=SPLITS),
    SourceType(
        "csv",
        "FILE.csv",
        "a table with the columns path, label and optionally split",
        suffixes=(".csv",),
        settings=SPLITS,
    ),
    SourceType(
        "torch",
        "torch/cifar100",
        "data sets of torchvision, in --data-dir",
        "torch/",
        settings=("root", *SPLITS, "download"),
    ),
    SourceType(
        "hfds",
        "hfds/OWNER/NAME",
        "Hugging Face data sets, by name or folder (extra hf-data)",
        "hfds/",
        settings=SOURCE_SETTINGS,
    ),
)


def source_type(source: str) -> str | None:
    """Return the name of the type that the text alone identifies; None for a path to be looked up, or unknown."""
    lower = source.lower()
    for item in SOURCE_TYPES:
        if source == item.pattern or (item.prefix and lower.startswith(item.prefix)) or lower.endswith(item.suffixes):
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
        if setting in SOURCE_SETTINGS and setting not in used
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
