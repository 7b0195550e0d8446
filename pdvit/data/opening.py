"""The ways to open images: a source to train on, or images to measure."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from pkgutil import resolve_name

import torch
from torch import Tensor

from pdvit.config.schema import Config, DataConfig
from pdvit.data.images import BadImages, decode_all, pixels_of
from pdvit.data.masks.folders import open_masks
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources import FILE_TYPES, SOURCE_TYPES, WHERE, source_type
from pdvit.data.sources.folder import list_images
from pdvit.data.sources.split import ArraySplit, FileSplit, Source, Split, subsample
from pdvit.errors import UserError, closest, closest_path, printable


def open_source(data: DataConfig, training: bool = True) -> Source:
    """Open a source by name or path; not for `training`: with the splits that there are, or `all`. Raises UserError."""
    name, path = source_type(data.source), Path(os.path.expanduser(data.source))
    if os.path.isdir(path) and name in (None, *FILE_TYPES):  # os.path, because Path raises for long names
        name = "folder"
    if name in FILE_TYPES and not os.path.isfile(path):
        raise UserError(f"there is no file '{data.source}'", WHERE, closest_path(data.source, "check the path"))
    if name is None:
        tip = closest(data.source, [item.pattern for item in SOURCE_TYPES.values() if item.pattern.islower()])
        tip = closest_path(data.source, tip)
        tip += " (--data help lists the source types; for compressed archives, shards and streams see docs/data.md)"
        raise UserError(f"'{data.source}' is no source, folder or table of images", WHERE, tip)
    if (reader := SOURCE_TYPES[name].reader) is None:
        what = f"'{data.source}' has classes of pixels, not of images"
        raise UserError(what, WHERE, "use pdvit segment, or --data digits")
    read: Callable[[DataConfig, bool], Source] = resolve_name(f"pdvit.data.sources.{reader}")
    return read(data, training)


@dataclass(frozen=True)
class ImageSet:
    """Images to measure, with a description."""

    description: str
    split: Split

    def subsample(self, limit: int) -> "ImageSet":
        """Return at most `limit` of them, spread evenly."""
        part = subsample(self.split, limit)
        return ImageSet(f"{self.description}, {len(part):,} of {len(self.split):,}", part)

    def pixels(self, preprocessing: Preprocessing, bad: BadImages) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the preprocessed pixels of each image, uint8 `(3, size, size)`; `bad` has the policy."""
        evaluation, in_memory = preprocessing.evaluation(), isinstance(self.split, ArraySplit)
        for index, image in decode_all(self.split, bad):
            pixels = preprocessing.fit(pixels_of(image)[None])[0] if in_memory else evaluation(image)
            yield printable(self.split.key(index)), pixels


def held_out_images(config: Config, training: bool = True) -> ImageSet:
    """Return the held-out images of a run, or of a source not for `training`: test, or else val, or else all."""
    masks = config.segment.head is not None or config.data.source == "scenes"
    source = open_masks(config.data, config.segment) if masks else open_source(config.data, training)
    name = source.final_split
    return ImageSet(f"{source.name}, {'all images' if name == 'all' else f'{name} split'}", source.select(name))


def open_images(names: list[str]) -> ImageSet:
    """Return the images of one source other than a folder, or of any folders and files; raises UserError."""
    sources = [name for name in names if source_type(name) and not os.path.isdir(os.path.expanduser(name))]
    if sources and len(names) == 1:
        return held_out_images(Config(data=DataConfig(source=names[0])), training=False)
    if sources:
        what = f"the source '{sources[0]}' can't be mixed with files"
        raise UserError(what, "--images", f"measure it by itself: --images {sources[0]}")
    return ImageSet(", ".join(names), image_files(names))


def image_files(names: list[str]) -> FileSplit:
    """Return the named files and the images of the named folders, each once; raises UserError if there are none."""
    paths: dict[Path, None] = {}
    for path in (Path(os.path.expanduser(name)) for name in names):
        if not os.path.isdir(path) and not os.path.isfile(path):  # os.path, because Path raises for long names
            tip = closest_path(str(path), "check the path; pdvit analyze also takes a source, such as digits")
            raise UserError("there is no such image or folder", str(path), tip)
        found = list_images(path) if os.path.isdir(path) else [path]
        if not found:
            raise UserError("the folder has no images", str(path), "name a folder with image files")
        paths |= dict.fromkeys(found)
    return FileSplit(list(paths), torch.zeros(len(paths), dtype=torch.long))


def sample_photographs() -> ImageSet:
    """Return the two photographs of scikit-learn."""
    folder = distribution("scikit-learn").locate_file("sklearn/datasets/images")  # to import it takes a second
    names = [str(folder / name) for name in ("china.jpg", "flower.jpg")]
    return ImageSet("sample photographs of scikit-learn", image_files(names))
