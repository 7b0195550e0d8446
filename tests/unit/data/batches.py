"""Small image files and splits, and training batches of them."""

import struct
import tarfile
from contextlib import closing
from itertools import islice

import numpy as np
import torch
from PIL import Image

from pdvit.config.schema import AugmentConfig, DataConfig
from pdvit.data.augment import Augmentation
from pdvit.data.loader import LoaderConfig, train_batches
from pdvit.data.mixing import Mixing
from pdvit.data.opening import open_source
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import FileSplit

CLASSES = 3
PREPROCESSING = Preprocessing(8, 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3)
LOADER = LoaderConfig(3, seed=5, workers=0, device=torch.device("cpu"), preprocessing=PREPROCESSING)


class OnGpu(torch.Tensor):
    """A tensor on the CPU that stands for one on a GPU, and so do the results of functions of it."""

    is_cuda = True


def mixing(labels=False, classes=CLASSES, **augment):
    """Return the mixing of these options of AugmentConfig."""
    return Mixing(AugmentConfig(**augment), 4, classes, labels)


OFF, ON = mixing(), mixing(cutmix=1.0)


def save_images(folder, images):
    """Write uint8 images `(3, H, W)` as PNG; return them as a split of three classes."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:02}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return FileSplit(paths, torch.arange(len(paths)) % CLASSES)


def tar_without_end(name):
    """Return a header of size -512 twice: a reader that goes on after the first finds it again, for ever."""
    header = bytearray(tarfile.TarInfo(name).tobuf())
    header[124:136], header[148:156] = b"\xff" * 10 + b"\xfe\x00", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) * 2


def write(path, pixels, form=None):
    """Save an array as an image; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, form)
    return path


def fill(path, value):
    """Give every pixel of an image file the same value."""
    write(path, np.full_like(np.asarray(Image.open(path)), value))


def grey_tiff(bits, row, white=False):
    """A TIFF of four pixels without compression: header, the row, and tags: size, bits, raw, what 0 is, ..."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: int(not white), 273: 8, 277: 1, 278: 1, 279: len(row)}
    body = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + len(row))
    return header + row + struct.pack("<H", len(tags)) + body + struct.pack("<I", 0)


def write_tree(root, names):
    """Write a small image file for each name; return the root."""
    for name in names:
        write(root / name, np.zeros((4, 4, 3), np.uint8), "PNG")
    return root


def opened(source, **options):
    """Return a source by its name or path; options are those of DataConfig."""
    return open_source(DataConfig(source=str(source), **options))


def keys(split):
    """Return the names of the images in a split."""
    return [split.key(index) for index in range(len(split))]


def take(split, count, start=0, loader=LOADER, mixing=OFF, **augment):
    """Return the batches of `count` steps from `start` on; further options are those of AugmentConfig."""
    augmentation = Augmentation.for_split(split, AugmentConfig(**augment), loader.preprocessing, loader.seed)
    with closing(train_batches(split, loader, augmentation, mixing, start)) as batches:
        return list(islice(batches, count))


def same(ours, theirs):
    """Whether two lists of batches are equal to the bit."""
    pairs = [(join([a]), join([b])) for a, b in zip(ours, theirs, strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def join(parts):
    """Return the tensors of the parts of a batch, one after the other."""
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    return {name: torch.cat(column) for name, column in columns.items() if column[0] is not None}
