from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CAMVID = ("Sky", "Road", "Car", "Unlabelled")


def save(path: Path, pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


def picture(number: int, height=12, width=16):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(number: int, values, height=12, width=16):
    return np.random.default_rng(number).choice(np.array(values, np.uint8), (height, width))


@pytest.fixture
def write():
    """A function that saves an array as an image."""
    return save


@pytest.fixture
def load():
    """A function that reads the pixels of an image file."""

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.array(image)

    return read


@pytest.fixture
def fill(load):
    """A function that gives every pixel of a mask the same value."""
    return lambda path, value: save(path, np.full_like(load(path), value))


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
    (root / "classes.tsv").write_text("".join(f"{at}\t{name}\n" for at, name in enumerate(CAMVID)))
    return root


@pytest.fixture
def ade(tmp_path) -> Path:
    """ADE20K's layout, with four classes; the folder above it."""
    root = tmp_path / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 4), ("validation", "val", 2)):
        for number in range(1, count + 1):
            name = f"ADE_{short}_{number:08d}"
            save(root / "images" / split / f"{name}.jpg", picture(number))
            save(root / "annotations" / split / f"{name}.png", ids(number, range(5)))
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.2\t9\t1\twall", "2\t0.1\t6\t6\tbuilding, edifice", "3\t0\t1\t1\tsky"]
    (root / "objectInfo150.txt").write_text("\n".join([*rows, "4\t0.1\t2\t2\tfloor, flooring"]) + "\n")
    return root


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    """Cityscapes' layout, with the other files beside labelIds, and a test split without labels."""
    root = tmp_path / "cityscapes"
    for split, cities in (("train", ("aachen", "ulm")), ("val", ("lindau",)), ("test", ("berlin",))):
        for city in cities:
            for frame in range(2):
                name = f"{city}_000000_{frame:06d}"
                save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", picture(frame))
                masks = root / "gtFine" / split / city
                values = [0] if split == "test" else [*range(34), 255]
                save(masks / f"{name}_gtFine_labelIds.png", ids(frame, values))
                save(masks / f"{name}_gtFine_color.png", picture(frame))
                save(masks / f"{name}_gtFine_instanceIds.png", ids(frame, [200]))
                (masks / f"{name}_gtFine_polygons.json").write_text("{}")
    return root
