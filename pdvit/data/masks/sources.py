"""Sources of masks by name or path: digit scenes, and folders of images and masks."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.bad_images import BadImage, refuse_masks
from pdvit.data.check import look_at_all
from pdvit.data.kinds import kind_of
from pdvit.data.masks.folders import LAYOUT, WHERE, find_folders
from pdvit.data.masks.scenes import read_scenes
from pdvit.data.masks.split import MaskFiles, MaskSplit, read_values
from pdvit.data.masks.table import OUTSIDE, ClassTable, Colour
from pdvit.data.masks.table_file import TIP, read_table
from pdvit.data.sources import Source
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
        notes.append(f"classes are the ids that the masks have; names: {TIP} (classes.tsv, --classes)")
    if "val" not in splits:
        splits = _held_out(splits, data.split_seed)
        notes.append(f"val is {HELD_OUT:.0%} of the training images, drawn by data.split_seed {data.split_seed}")
    return Source(root.resolve().name, table.names, splits, palette=table.palette).noting(*notes)
