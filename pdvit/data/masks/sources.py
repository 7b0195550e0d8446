"""Sources of masks by name or path: digit scenes, and folders of images and masks."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.bad_images import BadImage, BadMask, refuse_masks
from pdvit.data.check import look_at_all
from pdvit.data.kinds import kind_of
from pdvit.data.masks.folders import WHERE, find_folders
from pdvit.data.masks.scenes import read_scenes
from pdvit.data.masks.split import MaskFiles
from pdvit.data.masks.table import IGNORED, OUTSIDE, ClassTable, Colour, open_mask, values_of
from pdvit.data.masks.table_file import TIP, read_table
from pdvit.data.preprocessing import attempt, strict_decoders
from pdvit.data.sources import FileSplit, Source
from pdvit.data.sources.cache import Say, say_on_stderr
from pdvit.data.sources.holdout import HELD_OUT, ROLES, hold_out
from pdvit.errors import UserError


def open_masks(data: DataConfig, segment: SegmentConfig, say: Say = say_on_stderr) -> Source:
    """Open a source of images with masks, whose splits are `MaskSplit`s; `say` hears of what takes long.

    Raises UserError where there is no such folder, where it is laid out otherwise, where an image has no mask, and
    where the table of classes can't be read.
    """
    kind, path = kind_of(data.source), Path(os.path.expanduser(data.source))
    if kind == "scenes":
        if segment.classes is not None:
            raise UserError("digit scenes have their own classes", "segment.classes (--classes)", "leave it out")
        return read_scenes(data)
    if os.path.isdir(path):
        return read_folder(path, data, segment, say)
    if kind in (None, "folder"):
        raise UserError(f"there is no folder '{data.source}'", WHERE, "check the path, or take --data scenes")
    tip = "take --data scenes, or a folder with images/ and masks/"
    raise UserError(f"'{data.source}' has classes of images, not of pixels", WHERE, tip)


def read_folder(root: Path, data: DataConfig, segment: SegmentConfig, say: Say) -> Source:
    """Read a folder of images and masks; where there is no val, a tenth of train is held out."""
    folders = find_folders(root)
    table = folders.table if segment.classes is None else read_table(Path(os.path.expanduser(segment.classes)))
    chosen, notes = folders.splits(data)
    splits = dict[str, MaskFiles]()
    for role in (role for role in ROLES if role in chosen):
        images, masks, said = folders.pairs(chosen[role])
        splits[role] = MaskFiles.of(images, masks, table or ClassTable([], [], None))
        notes += said
    if table is None:
        table = found_table(splits, data.workers, say)
        splits = {role: split.with_table(table) for role, split in splits.items()}
        notes.append("classes are the ids that the masks have; a table (classes.tsv, --classes) gives them names")
    if ignored := [str(value) for value, place in (table.ids or {}).items() if place == IGNORED and value != IGNORED]:
        notes.append(f"ignored in masks: {', '.join(ignored)}")
    if "val" not in splits:
        splits = _held_out(splits, data.split_seed)
        notes.append(f"val is {HELD_OUT:.0%} of the training images, drawn by data.split_seed {data.split_seed}")
    return Source(root.resolve().name, table.names, splits, palette=table.palette).noting(*notes)


def found_table(splits: Mapping[str, MaskFiles], workers: int, say: Say) -> ClassTable:
    """Return the table of the ids that the masks of all splits have, 255 left out: all of them are read.

    Raises UserError naming masks that hold no ids, and where there are too few or too many of them.
    """
    bad, ids = dict[str, str](), set[int]()
    for name, split in splits.items():
        for seen in look_at_all(split, name, _ids, workers, say, (0, 1)).values():
            if isinstance(seen, BadMask):
                bad[seen.name] = seen.reason
            else:
                ids |= seen
    refuse_masks(bad, f"without a table of classes masks hold ids; else {TIP}")
    known = sorted(ids - {IGNORED})
    if not 2 <= len(known) <= OUTSIDE:
        what = f"the masks have {len(known)} ids beside {IGNORED}, where 2 to {OUTSIDE} are classes"
        raise UserError(what, "segment.classes (--classes)", TIP)
    return ClassTable.of_ids({value: str(value) for value in known}, palette=_palette(splits["train"].masks[0], known))


def _ids(split: MaskFiles, index: int) -> set[int] | BadMask:
    with strict_decoders():
        ids = attempt(split, index, _ids_of, split.masks[index])
    return BadMask(split.mask_name(index), ids.reason) if isinstance(ids, BadImage) else ids


def _ids_of(path: Path) -> set[int]:
    with open_mask(path) as image:
        return set(np.unique(values_of(image)).tolist())


def _palette(path: Path, ids: list[int]) -> list[Colour] | None:
    """Return the colours that a mask's own palette gives to ids; None where it has none for all of them."""
    with open_mask(path) as image:
        levels = image.getpalette("RGB") or []
    colours = [
        (levels[3 * value], levels[3 * value + 1], levels[3 * value + 2])
        for value in ids
        if 3 * value + 2 < len(levels)
    ]
    return colours if len(colours) == len(ids) else None


def _held_out(splits: Mapping[str, MaskFiles], seed: int) -> dict[str, MaskFiles]:
    train = splits["train"]
    of_one_class = FileSplit(train.images.paths, torch.zeros(len(train), dtype=torch.long))
    rest, held = hold_out(replace(train, images=of_one_class), seed)
    found = {**splits, "train": rest, "val": held}
    return {role: found[role] for role in ROLES if role in found}
