"""WebDataset shards: tar files in which an image and its label share a name. They are read in place, at random."""

import json
import re
from collections.abc import Sequence
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from typing import Any

import torch

from pdvit.config.schema import DataConfig
from pdvit.data.sources.archive import Member, MemberSplit, plain_tar, tar_members
from pdvit.data.sources.cache import Say
from pdvit.data.sources.holdout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES, assemble, choose_splits
from pdvit.data.sources.labels import as_classes
from pdvit.data.sources.split import Source, some
from pdvit.errors import UserError

# The name of a sample and its ending, as WebDataset divides them: at the first dot of the last part.
SAMPLE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
IMAGES = ("jpg", "jpeg", "png", "webp")
INFO = ("_info.json", "info.json")


def read_shards(data: DataConfig, say: Say) -> Source:
    """Read the shards in `data.root`, or in the folder after `wds/`.

    Splits are those of `_info.json`, or the words train, val and test in the shards' names; --train-split and
    --val-split may name shards themselves, as in `train-{000..099}.tar` or `train-*.tar`. Raises UserError where
    shards are missing, and where a sample has no label.
    """
    root = Path(data.root or data.source.partition("/")[2]).expanduser()
    found = _found(root)
    chosen = choose_splits(list(found), data)
    if "train" not in chosen:
        what = f"no shards of a train split in '{root}' (found: {', '.join(found) or 'none'})"
        raise UserError(what, "data.root (--data-dir)", "name them: --train-split 'train-{000..099}.tar'")
    members = {}
    for role, name in chosen.items():
        files = [root / shard for shard in found[name]] if name in found else _expand(root, name)
        members[role] = [sample for file in files for sample in _samples(file, data, say)]
    labels = {role: [label for _, label in samples] for role, samples in members.items()}
    classes, numbers = as_classes(labels, None, data.source)
    splits = {role: MemberSplit([member for member, _ in members[role]], numbers[role]) for role in members}
    return assemble(root.resolve().name, classes, splits, data)


def shard_split(file: Path, data: DataConfig, say: Say) -> MemberSplit:
    """Return one shard whose labels are class indices as a split."""
    samples = _samples(file, data, say)
    return MemberSplit([member for member, _ in samples], torch.tensor([label for _, label in samples]))


def _found(root: Path) -> dict[str, list[str]]:
    """Return the shards by split."""
    for name in INFO:
        if (root / name).is_file():
            try:
                splits = json.loads((root / name).read_text(encoding="utf-8"))["splits"]
                return {split: list(info["filenames"]) for split, info in splits.items()}
            except (ValueError, LookupError, TypeError) as error:
                tip = "it wants splits.NAME.filenames; without the file, names of shards tell their split"
                raise UserError("the list of shards can't be read", str(root / name), tip) from error
    shards = sorted(path.name for path in root.glob("*.tar*")) if root.is_dir() else []
    words = {shard: set(re.split(r"[^a-z]+", shard.lower())) for shard in shards}
    names = (*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES)
    by_name = {name: [shard for shard in shards if name in words[shard]] for name in names}
    return {name: files for name, files in by_name.items() if files}


def _expand(root: Path, text: str) -> list[Path]:
    """Return the shards that a text names: {000..099} counts, * matches, what follows | is timm's number of images."""
    text = text.partition("|")[0]
    if "://" in text or text.startswith("pipe:"):
        what = "shards that come over a network have no order that a run could be resumed in"
        raise UserError(what, f"'{text}'", "download them, and name their folder with --data-dir")
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", text)
    ranges: list[Sequence[str]] = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        ranges.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
    names = ["".join(_between(parts[::3], numbers)) for numbers in product(*ranges)]
    files = [Path(file) for name in names for file in _matches(str(root / name))]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        what = f"{len(missing) or 'all'} shards are missing: {some(missing or [text])}"
        raise UserError(what, f"{root} (--data-dir)", "check --train-split and --val-split")
    return files


def _matches(path: str) -> list[str]:
    return sorted(glob(path)) if has_magic(path) else [path]


def _between(texts: Sequence[str], numbers: Sequence[str]) -> list[str]:
    return [part for pair in zip(texts, [*numbers, ""], strict=True) for part in pair]


def _samples(file: Path, data: DataConfig, say: Say) -> list[tuple[Member, Any]]:
    """Return image and label of each sample of a shard."""
    by_key: dict[str, dict[str, Member]] = {}
    for path, member in tar_members(plain_tar(file, say)).items():
        if match := SAMPLE.fullmatch(path):
            by_key.setdefault(match[1], {})[match[2].lower()] = member
    endings = tuple((data.input_key or "").split(";")) if data.input_key else IMAGES
    found = []
    for key, parts in by_key.items():
        image = next((parts[ending] for ending in endings if ending in parts), None)
        if image is not None:
            found.append((image, _label(parts, data.target_key, f"{file}/{key}")))
    if not found:
        raise UserError(f"no images ({', '.join(endings)}) in the shard", str(file), "name their ending: --input-key")
    return found


def _label(parts: dict[str, Member], key: str | None, where: str) -> Any:
    """Return the number in .cls, or what is under the key in .json."""
    ending = "json" if key else "cls"
    try:
        content = parts[ending].read()
        return json.loads(content)[key] if key else int(content)
    except (LookupError, ValueError, TypeError, OSError, EOFError) as error:
        what = f"the sample has no label in .{ending}{f', under {key}' if key else ''}"
        raise UserError(what, where, "--target-key names the key of the label in .json") from error
