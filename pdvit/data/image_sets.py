"""Images to measure: held-out images of a source, a folder, single files."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from pdvit.config.schema import Config, DataConfig
from pdvit.data.images import BadImage, BadImages, pixels_of, try_read
from pdvit.data.masks.folders import open_masks
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources import printable, source_type
from pdvit.data.sources.folder import list_images
from pdvit.data.sources.opening import open_source
from pdvit.data.sources.split import ArraySplit, FileSplit, Split, subsample
from pdvit.errors import UserError, closest


@dataclass(frozen=True)
class ImageSet:
    """Images to measure, with a description."""

    description: str
    split: Split

    def subsample(self, limit: int) -> "ImageSet":
        """Return at most `limit` of them, spread evenly."""
        size = len(self.split)
        if size <= limit:
            return self
        return ImageSet(f"{self.description}, {limit} of {size:,}", subsample(self.split, limit))

    def pixels(self, preprocessing: Preprocessing, bad: BadImages) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the preprocessed pixels of each image, uint8 `(3, size, size)`; `bad` has the policy."""
        evaluation, in_memory = preprocessing.evaluation(), isinstance(self.split, ArraySplit)
        for index in range(len(self.split)):
            image = try_read(self.split, index)
            if isinstance(image, BadImage):
                bad.add([image])
            else:
                pixels = preprocessing.fit(pixels_of(image)[None])[0] if in_memory else evaluation(image)
                yield printable(self.split.key(index)), pixels


def held_out_images(config: Config) -> ImageSet:
    """Return the held-out images of a run: its test split, or else validation."""
    masks = config.segment.head is not None or config.data.source == "scenes"
    source = open_masks(config.data, config.segment) if masks else open_source(config.data)
    return ImageSet(f"{source.name}, {source.final_split} split", source.splits[source.final_split])


def open_images(names: list[str]) -> ImageSet:
    """Return the images of names: one source other than a folder, or any folders and files.

    Raises UserError if a name is none of these, or a folder has no images.
    """
    sources = [name for name in names if source_type(name) and not os.path.isdir(os.path.expanduser(name))]
    if sources and len(names) == 1:
        return held_out_images(Config(data=DataConfig(source=names[0])))
    if mixed := sorted(sources):
        what = f"the source '{mixed[0]}' can't be mixed with files"
        raise UserError(what, "--images", f"measure it by itself: --images {mixed[0]}")
    return ImageSet(", ".join(names), image_files(names))


def image_files(names: list[str]) -> FileSplit:
    """Return the named files and the images of the named folders, each once; raises UserError if there are none."""
    paths: dict[Path, None] = {}
    for path in (Path(os.path.expanduser(name)) for name in names):
        if os.path.isfile(path):  # os.path, because Path raises for long names
            paths[path] = None
            continue
        if not os.path.isdir(path):
            tip = closest(str(path), ["digits"])
            raise UserError("there is no such image, folder or source", f"--images {path}", tip)
        found = list_images(path)
        if not found:
            raise UserError("the folder has no images", str(path), "name a folder with image files")
        paths |= dict.fromkeys(found)
    return FileSplit(list(paths), torch.zeros(len(paths), dtype=torch.long))


def sample_photographs() -> ImageSet:
    """Return the two photographs of scikit-learn."""
    folder = Path(str(files("sklearn.datasets").joinpath("images")))
    paths = [folder / "china.jpg", folder / "flower.jpg"]
    return ImageSet("2 sample photographs of scikit-learn", FileSplit(paths, torch.zeros(2, dtype=torch.long)))
