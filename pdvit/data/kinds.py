"""The kinds of sources, as `--data help` lists them. No torch: the list has to come at once."""

import os
from dataclasses import dataclass, fields

from pdvit.config.schema import DataConfig


@dataclass(frozen=True)
class Kind:
    """One kind of source: how it is written, what it is, and the beginning or end of the text that tells it."""

    name: str
    written: str
    help: str
    prefix: str = ""
    suffixes: tuple[str, ...] = ()


KINDS = (
    Kind("digits", "digits", "1,797 handwritten digits of scikit-learn, built in; some: digits:0-4", "digits:"),
    Kind(
        "scenes",
        "scenes",
        "handwritten numbers on textured grounds, with a class for every pixel, built in (pdvit segment)",
    ),
    Kind("folder", "FOLDER", "train/CLASS/IMAGE with val/, validation/ or test/; or CLASS/IMAGE alone"),
    Kind("tar", "FILE.tar", "the same inside a plain tar, read in place", suffixes=(".tar",)),
    Kind("csv", "FILE.csv", "a table with the columns path, label and perhaps split", suffixes=(".csv",)),
    Kind("torch", "torch/cifar100", "data sets of torchvision, in --data-dir", "torch/"),
    Kind("hfds", "hfds/OWNER/NAME", "Hugging Face data sets, by name or folder (extra hf-data)", "hfds/"),
)
SPLITS, KEYS = ("train_split", "val_split"), ("input_key", "target_key")
OF_SOURCES = ("root", *SPLITS, *KEYS, "download")
# Which of the settings that describe a source mean something, by kind.
TAKES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "scenes": (),
    "folder": SPLITS,
    "tar": SPLITS,
    "csv": SPLITS,
    "torch": ("root", *SPLITS, "download"),
    "hfds": OF_SOURCES,
}


def kind_of(source: str) -> str | None:
    """Return the kind that the text alone tells; None for a path that has to be looked at, or nothing known."""
    lower = source.lower()
    for kind in KINDS:
        if source == kind.written or (kind.prefix and lower.startswith(kind.prefix)):
            return kind.name
        if kind.suffixes and lower.endswith(kind.suffixes):
            return kind.name
    return None


def unused_source_settings(data: DataConfig) -> list[str]:
    """Return a note for each setting of a source that differs from its default and that this source does not have."""
    taken = TAKES[kind_of(data.source) or "folder"]
    names = [item.name for item in fields(data) if getattr(data, item.name) != item.default]
    return [
        f"data.{name} = {getattr(data, name)} has no effect: '{data.source}' does not have it"
        for name in names
        if name in OF_SOURCES and name not in taken
    ]


def whole_path(source: str) -> str:
    """Return a source with the path in it, where there is one, made whole: it is then found from anywhere."""
    kind, prefix = kind_of(source), ""
    if kind == "hfds":
        prefix = source[: len(f"{kind}/")]
    elif kind not in (None, "tar", "csv"):
        return source
    path = os.path.expanduser(source.removeprefix(prefix))
    return prefix + os.path.abspath(path) if os.path.exists(path) else source


def list_kinds() -> str:
    """Return one line for each kind."""
    width = max(len(kind.written) for kind in KINDS)
    lines = (f"  {kind.written:{width}}  {kind.help}" for kind in KINDS)
    return "\n".join(["--data takes:", *lines, "docs/data.md says more"])
