"""Sources of masks: digit scenes, and folders of images and masks (ADE20K, Cityscapes, CamVid or the user's own)."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import Cityscapes

from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.images import BadImage, BadMask, attempt, describe_bad, refuse_bad, try_mask
from pdvit.data.masks.table import IGNORED, OUTSIDE, TIP, ClassTable, mask_values, read_table
from pdvit.data.sources import WHERE, first_names, source_type
from pdvit.data.sources.digits import read_scenes
from pdvit.data.sources.folder import MASKS, folder_names, list_images, not_read
from pdvit.data.sources.split import (
    SPLIT_NAMES,
    FileSplit,
    MaskSplit,
    Source,
    Split,
    choose_splits,
    hold_out,
    image_size,
)
from pdvit.errors import UserError, closest_path
from pdvit.files import read_text, reading

ADE, OBJECTS, CITYSCAPES = "ADEChallengeData2016", "objectInfo150.txt", "gtFine"
LOGGED = 4096  # masks between two progress messages
FIX = "mend or remove them; ids or colours outside of the table need a line in it (--classes)"
TABLES = ("classes.tsv", "classes.csv")
Log = Callable[[str], None]
to_stderr: Log = partial(print, file=sys.stderr)
LAYOUT = "lay it out as images/{train,val} and masks/{train,val}, or images/ and masks/ alone"


def open_masks(data: DataConfig, segment: SegmentConfig, log: Log = to_stderr, training: bool = True) -> Source:
    """Open a source of images with masks as `open_source`; its splits are `MaskSplit`s, `log` receives the progress."""
    root = Path(os.path.expanduser(data.source))
    if source_type(data.source) == "scenes":
        return read_scenes(data)
    if not os.path.isdir(root):
        tip = closest_path(data.source, "use --data scenes, or a folder with images/ and masks/")
        raise UserError(f"there is no folder '{data.source}', and other sources have no masks", WHERE, tip)
    folders = find_folders(root)
    table = folders.table if segment.classes is None else read_table(Path(os.path.expanduser(segment.classes)))
    chosen, notes = folders.splits(data, training)
    pairs = {role: folders.pairs(folder, notes) for role, folder in chosen.items()}
    if table is None:
        table = infer_table({role: masks for role, (_, masks) in pairs.items()}, data.workers, log)
        notes.append("classes are the ids in the masks; a table (classes.tsv, --classes) gives them names")
    splits: dict[str, Split] = {
        role: MaskFiles(images.paths, images.labels, masks.paths, table) for role, (images, masks) in pairs.items()
    }
    if ignored := [str(value) for value, place in table.ids.items() if place == IGNORED and value != IGNORED]:
        notes.append(f"ignored in masks: {', '.join(ignored)}")
    if training and "val" not in splits:
        splits, note = hold_out(splits, data.split_seed)
        notes.append(note)
    return Source(root.resolve().name, table.names, splits, palette=table.palette).noting(*notes)


@dataclass(frozen=True)
class MaskFiles(FileSplit, MaskSplit):
    """Image files with mask files, which are read through one class table."""

    masks: list[Path]
    table: ClassTable

    def mask(self, index: int) -> Tensor:
        """Read the file of a mask."""
        return self.table.read(FileSplit(self.masks, self.labels).open(index))

    def mask_name(self, index: int) -> str:
        """Return the mask's path."""
        return str(self.masks[index])

    def key(self, index: int) -> str:
        """Return the file names of image and mask."""
        return f"{super().key(index)}/{self.masks[index].name}"

    def hash(self) -> str:
        """Return a hash of the names and the table, but not of its palette."""
        ids, colours = (sorted(known.items()) or None for known in (self.table.ids, self.table.colours))
        text = f"{super().hash()} {(self.table.names, ids, colours)!r}"
        return sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class MaskFolders:
    """A layout: the folder of images and that of masks, with the splits below both, and the class table if known."""

    root: Path
    images: str
    masks: str
    table: ClassTable | None
    endings: tuple[str, str] = ("", "")  # of the stems of an image and its mask, whose paths are alike but for suffixes

    def splits(self, data: DataConfig, training: bool) -> tuple[dict[str, str], list[str]]:
        """Return the folder of each split by role (without folders train or `all`) and notes; raises UserError."""
        images, masks = (folder_names(self.root / name) for name in (self.images, self.masks))
        found = [name for name in images if name in {*SPLIT_NAMES, data.train_split, data.val_split}]
        if not found and not (data.train_split or data.val_split):
            return {"train" if training else "all": ""}, []
        unlabelled = "test" if self.masks == CITYSCAPES else None  # its masks are empty
        usable = [name for name in found if name in masks and name != unlabelled]
        chosen = choose_splits(usable, data, f"{self.root}/{self.masks}", LAYOUT, training, needed=["train"])
        return chosen, [f"{name} is not used: it has no labels" for name in found if name not in usable]

    def pairs(self, split: str, notes: list[str]) -> tuple[FileSplit, FileSplit]:
        """Return images and masks of a split, in the same order; notes masks without image; raises UserError."""
        images, masks, others = dict[str, Path](), dict[str, Path](), list[str]()
        for folder, ending, files in zip((self.images, self.masks), self.endings, (images, masks), strict=True):
            root = self.root / folder / split
            for path in list_images(root, others):
                stem = str(path.relative_to(root).with_suffix(""))
                if stem.endswith(ending) and (first := files.setdefault(stem.removesuffix(ending), path)) is not path:
                    what = f"{first.name} and {path.name} have the same name but for the suffix"
                    raise UserError(what, str(root), "rename or remove one")
        if not images:
            raise UserError(f"no images in {self.images}/{split}", str(self.root), LAYOUT)
        if missing := {str(path): "no mask" for stem, path in images.items() if stem not in masks}:
            what = f"images without a mask in {self.masks}/{split}: {len(missing)}"
            ending = f" and {self.endings[1]}" if self.endings[1] else ""
            raise UserError(what, describe_bad(missing), f"add a file of the same name{ending} in {self.masks}/")
        if others:
            notes.append(f"{split or self.images}: {not_read(others)}")
        if extra := len(masks) - len(images):
            notes.append(f"masks without an image in {self.images}/{split}: {extra:,}")
        labels = torch.zeros(len(images), dtype=torch.long)
        return FileSplit(list(images.values()), labels), FileSplit([masks[stem] for stem in images], labels)


def find_folders(root: Path) -> MaskFolders:
    """Recognize the layout of a folder; raises UserError if it has no images with masks."""
    for folder in (root, root / ADE):
        known = folder.resolve().name == ADE or (folder / OBJECTS).is_file()  # other sets may have these folders
        if known and all((folder / name / "training").is_dir() for name in ("images", "annotations")):
            return MaskFolders(folder, "images", "annotations", ade_table(folder))
    if all((root / name).is_dir() for name in ("leftImg8bit", CITYSCAPES)):
        return MaskFolders(root, "leftImg8bit", CITYSCAPES, cityscapes_table(), ("_leftImg8bit", "_gtFine_labelIds"))
    masks = next((name for name in MASKS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        found = ", ".join(folder_names(root)[:6]) or "no folders"
        raise UserError(f"'{root}' has no images/ and masks/ (found: {found})", WHERE, LAYOUT)
    file = next((root / name for name in TABLES if (root / name).is_file()), None)
    return MaskFolders(root, "images", masks, read_table(file) if file else None)


def ade_table(folder: Path) -> ClassTable:
    """Return ADE20K's 150 classes, by the first of their names in objectInfo150.txt; 0 is ignored."""
    file = folder / OBJECTS
    with reading(file, "it comes with the images: unpack the whole archive", "the names of classes can't be read"):
        rows = [line.split("\t") for line in read_text(file).splitlines()[1:]]
        names = {int(row[0]): row[4].split(",")[0].strip() for row in rows if any(row)}
    return ClassTable.of_ids(names, ignored=[0])


def cityscapes_table() -> ClassTable:
    """Return the 19 classes that Cityscapes scores, read from labelIds; the other ids are ignored."""
    known = [item for item in Cityscapes.classes if item.id >= 0]  # a licence plate has -1
    scored = sorted((item for item in known if not item.ignore_in_eval), key=lambda item: item.train_id)
    ignored = [item.id for item in known if item.ignore_in_eval]
    return ClassTable.of_ids({item.id: item.name for item in scored}, ignored, [item.color for item in scored])


def infer_table(splits: Mapping[str, FileSplit], workers: int | None, log: Log) -> ClassTable:
    """Return the table of the ids in all masks, in the colours of the first if it has them all; raises UserError."""
    found = list[Any]()
    for name, masks in splits.items():
        found += scan_masks(partial(_ids_in, masks), len(masks), name, workers, log)
    bad = {item.name: item.reason for item in found if isinstance(item, BadImage)}
    refuse_bad(bad, f"without a class table masks need ids; else {TIP}", "mask")
    every = sorted(set[int]().union(*found))
    known = every if len(every) == 2 else [value for value in every if value != IGNORED]  # binary masks: 0 and 255
    if not 2 <= len(known) <= OUTSIDE:
        what = f"the masks have {len(known)} ids; 2 to {OUTSIDE} can be classes"
        raise UserError(what, "segment.classes (--classes)", TIP)
    with next(iter(splits.values())).open(0) as image:
        levels = image.getpalette("RGB") or []
    colours = list(zip(levels[::3], levels[1::3], levels[2::3], strict=False))
    palette = [colours[value] for value in known] if len(colours) > known[-1] else None
    return ClassTable.of_ids({value: str(value) for value in known}, palette=palette)


def _ids_in(masks: FileSplit, index: int) -> set[int] | BadImage:
    return attempt(masks, index, lambda index: set(np.unique(mask_values(masks.open(index))).tolist()))


def check_masks(source: Source, every: bool, workers: int | None, log: Log) -> list[str]:
    """Read mask files before the run; return notes on them.

    `every` reads all masks, and refuses those that ignore every pixel. Else held-out masks are read, since their faults
    would end the run after the training, and the first training mask, since it shows a fault that all have. Classes
    without a pixel in a split are noted. Raises UserError for bad masks, and for a held-out split of which no pixel has
    a class.
    """
    bad, notes, classes = dict[str, str](), ["all masks are sound"] if every else [], source.classes
    for name, split in source.splits.items():
        assert isinstance(split, MaskFiles)
        count = len(split) if every or name != "train" else 1
        found = scan_masks(partial(_classes_in, split, every), count, name, workers, log)
        bad |= {item.name: item.reason for item in found if isinstance(item, BadMask)}
        present = set[int]().union(*(item for item in found if not isinstance(item, BadMask)))
        if count == len(split) and len(present) < len(classes):
            absent = [label for place, label in enumerate(classes) if place not in present]
            notes.append(f"{len(absent)} of {len(classes)} classes are in no mask of {name}: {first_names(absent)}")
        if name != "train" and not present and not bad:
            what = f"no pixel of the {len(split)} masks of {name} has a class"
            raise UserError(what, "data.source (--data)", f"label the masks of {name}, or move them away")
    refuse_bad(bad, FIX, "mask")
    return notes


def _classes_in(split: MaskFiles, labelled: bool, index: int) -> BadMask | set[int]:
    """Return the classes in a mask, or its fault; with `labelled` a mask without classes has one."""
    mask = try_mask(split, index, image_size(split, index))
    if isinstance(mask, BadMask):
        return mask
    classes = set(mask.flatten().bincount()[:OUTSIDE].nonzero().flatten().tolist())
    return classes if classes or not labelled else BadMask(split.mask_name(index), "all of its pixels are ignored")


def scan_masks(read: Callable[[int], Any], count: int, name: str, workers: int | None, log: Log) -> list[Any]:
    """Return `read(index)` for the first masks of a split, computed in threads: decoders release the GIL."""
    found: list[Any] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(1 if workers == 0 else workers) as pool:
        # the filters are global: set out here, this one stays while threads add and take back their own
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for result in pool.map(read, range(count)):
                found.append(result)
                if len(found) % LOGGED == 0:
                    log(f"read {len(found):,} masks of {name}")
        finally:
            pool.shutdown(cancel_futures=True)  # a stop or an error does not wait for the others
    return found
