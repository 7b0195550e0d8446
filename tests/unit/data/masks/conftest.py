from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def save(path: Path, pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


def picture(number: int, height=12, width=16):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(number: int, values, height=12, width=16):
    return np.random.default_rng(number).choice(np.array(values, np.uint8), (height, width))


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture
def write():
    """A function that saves an array as an image."""
    return save


@pytest.fixture
def load():
    """A function that reads the pixels of an image file."""
    return pixels_of


@pytest.fixture
def fill():
    """A function that gives every pixel of a mask the same value."""
    return lambda path, value: save(path, np.full_like(pixels_of(path), value))


@pytest.fixture
def camvid(tmp_path) -> Path:
    """Images and masks in train, val and test with a table; value 3 is unlabelled. Sizes are odd, some portrait."""
    root, number = tmp_path / "roads", 0
    for split, count in (("train", 7), ("val", 3), ("test", 2)):
        for place in range(count):
            number += 1
            size = (13 + place, 17) if place % 2 else (21, 11 + place)
            save(root / "images" / split / f"{number}.png", picture(number, *size))
            save(root / "masks" / split / f"{number}.png", ids(number, range(4), *size))
    (root / "classes.tsv").write_text("0\tSky\n1\tRoad\n2\tCar\n3\tUnlabelled\n")
    return root
