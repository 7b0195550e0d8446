"""Folders of images and masks: ADE20K and Cityscapes as they are published, and any pair of folders."""

from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import Cityscapes

from pdvit.config.schema import DataConfig
from pdvit.data.bad_images import NAMED
from pdvit.data.masks.table import ClassTable
from pdvit.data.masks.table_file import read_table
from pdvit.data.sources.holdout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES, choose_splits
from pdvit.data.sources.split import printable
from pdvit.data.sources.tree import FolderTree, is_image
from pdvit.errors import UserError

WHERE = "data.source (--data)"
ADE, OBJECTS = "ADEChallengeData2016", "objectInfo150.txt"
MASKS, TABLES = ("masks", "annotations", "labels"), ("classes.tsv", "classes.csv")
LAYOUT = "lay it out as images/{train,val} and masks/{train,val}, or images/ and masks/ alone"


@dataclass(frozen=True)
class Folders:
    """Where a set has its images and its masks, by split below both, and what its masks mean where that is known.

    An image and its mask have the same path but for the ends of their names, which are given without suffix.
    """

    root: Path
    images: str
    masks: str
    table: ClassTable | None = None
    ends: tuple[str, str] = ("", "")
    unlabelled: tuple[str, ...] = ()
    """Splits whose masks say nothing."""

    def splits(self, data: DataConfig) -> tuple[dict[str, str], list[str]]:
        """Return which folder of both serves as which split, and notes; folders without splits are all train.

        Raises UserError where a split that is asked for is not there.
        """
        found = {kind: FolderTree(self.root / kind).folders() for kind in (self.images, self.masks)}
        known = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES, data.train_split, data.val_split}
        folders = [name for name in found[self.images] if name in known]
        if not folders and not (data.train_split or data.val_split):
            return {"train": ""}, []
        usable = [name for name in folders if name in found[self.masks] and name not in self.unlabelled]
        notes = [f"{name} is not used: it has no labels" for name in folders if name not in usable]
        chosen = choose_splits(usable, data)
        for name in (chosen.get("train", "train"), *chosen.values()):
            if name not in usable:
                what = f"there is no {self.images}/{name} with masks (found: {', '.join(usable) or 'nothing'})"
                raise UserError(what, str(self.root), LAYOUT)
        return chosen, notes

    def pairs(self, split: str) -> tuple[list[Path], list[Path], list[str]]:
        """Return the images of a split, their masks, and notes; UserError names images without a mask."""
        images = self._files(self.images, split, self.ends[0])
        masks = self._files(self.masks, split, self.ends[1])
        if not images:
            raise UserError(f"no images in {self.images}/{split}", str(self.root), LAYOUT)
        missing = [str(path) for stem, path in images.items() if stem not in masks]
        if missing:
            count = "1 image has" if len(missing) == 1 else f"{len(missing)} images have"
            shown = "; ".join(missing[:NAMED]) + (f"; and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
            tip = f"expected for each a file of the same name{self.ends[1] and ' and ' + self.ends[1]} in {self.masks}/"
            raise UserError(f"{count} no mask in {self.masks}/{split}", printable(shown), tip)
        extra = len(masks) - len(images)
        count = "1 mask has" if extra == 1 else f"{extra:,} masks have"
        notes = [f"{count} no image in {self.images}/{split}"] if extra else []
        return list(images.values()), [masks[stem] for stem in images], notes

    def _files(self, kind: str, split: str, end: str) -> dict[str, Path]:
        """Return the images below a folder, by their path there without suffix and end; UserError for two of one."""
        folder, files = self.root / kind / split, dict[str, Path]()
        for file in FolderTree(folder).files(""):
            stem = file.rpartition(".")[0]
            if not is_image(file) or not stem.endswith(end):
                continue
            stem = stem.removesuffix(end)
            if stem in files:
                what = f"{files[stem].name} and {Path(file).name} have the same name but for the suffix"
                raise UserError(what, str(folder), "rename or remove one, so that it is clear which belongs to which")
            files[stem] = folder / file
        return files


def find_folders(root: Path) -> Folders:
    """Tell the layout of a folder; UserError where it has none with masks."""
    for folder in (root, root / ADE):
        known = folder.resolve().name == ADE or (folder / OBJECTS).is_file()  # sets of one's own may have these folders
        if known and all((folder / kind / "training").is_dir() for kind in ("images", "annotations")):
            return Folders(folder, "images", "annotations", ade_table(folder))
    if all((root / kind).is_dir() for kind in ("leftImg8bit", "gtFine")):
        ends = ("_leftImg8bit", "_gtFine_labelIds")
        return Folders(root, "leftImg8bit", "gtFine", cityscapes_table(), ends, ("test",))
    masks = next((name for name in MASKS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        found = ", ".join(FolderTree(root).folders()[:6]) or "no folders"
        raise UserError(f"'{root}' has no images/ and masks/ (found: {printable(found)})", WHERE, LAYOUT)
    file = next((root / name for name in TABLES if (root / name).is_file()), None)
    return Folders(root, "images", masks, read_table(file) if file else None)


def ade_table(folder: Path) -> ClassTable | None:
    """Return ADE20K's 150 classes, by the first of their names in objectInfo150.txt; 0 is ignored."""
    file = folder / OBJECTS
    if not file.is_file():
        what = f"there is no {OBJECTS}, which names the classes"
        raise UserError(what, str(folder), "it comes with the images: unpack the whole archive")
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    try:
        return ClassTable.of_ids({int(row[0]): row[4].split(",")[0].strip() for row in rows if any(row)}, ignored=[0])
    except (IndexError, ValueError) as error:
        raise UserError(f"{OBJECTS} can't be read: {error}", str(file), "restore it from the archive") from error


def cityscapes_table() -> ClassTable:
    """Return the 19 classes that Cityscapes scores, read from labelIds; the other ids are ignored."""
    kinds = [kind for kind in Cityscapes.classes if kind.id >= 0]  # a licence plate has -1
    scored = sorted((kind for kind in kinds if not kind.ignore_in_eval), key=lambda kind: kind.train_id)
    ignored = [kind.id for kind in kinds if kind.ignore_in_eval]
    return ClassTable.of_ids({kind.id: kind.name for kind in scored}, ignored, [kind.color for kind in scored])
