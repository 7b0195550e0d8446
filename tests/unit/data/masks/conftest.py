from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.batches import write


@pytest.fixture
def camvid(tmp_path) -> Path:
    """Images and masks in train, val and test with a table; value 3 is unlabelled. Sizes are odd, some portrait."""
    root, number = tmp_path / "roads", 0
    for split, count in (("train", 7), ("val", 3), ("test", 2)):
        for place in range(count):
            number += 1
            size, rng = (13 + place, 17) if place % 2 else (21, 11 + place), np.random.default_rng(number)
            write(root / "images" / split / f"{number}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            write(root / "masks" / split / f"{number}.png", rng.integers(0, 4, size, dtype=np.uint8))
    (root / "classes.tsv").write_text("0\tSky\n1\tRoad\n2\tCar\n3\tUnlabelled\n")
    return root
