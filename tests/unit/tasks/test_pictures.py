import io

import numpy as np
import torch
from PIL import Image

from pdvit.config.schema import Config
from pdvit.data.loader import LoaderConfig
from pdvit.data.masks.folders import MaskFiles
from pdvit.data.masks.table import ClassTable
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import Source
from pdvit.tasks.pictures import overlay, palette_image, png, prediction_pngs
from pdvit.tasks.windows import SlidingWindowConfig

PALETTE = [(10, 20, 30), (200, 0, 0)]
MASK = torch.tensor([[0, 1, 255], [1, 1, 0]], dtype=torch.uint8)


def test_masks_keep_their_values_under_the_colours_of_the_classes():
    image = Image.open(io.BytesIO(png(palette_image(MASK, PALETTE))))
    assert image.mode == "P"
    assert np.array_equal(np.array(image), MASK.numpy())
    colours = np.array(image.convert("RGB"))
    assert [tuple(colours[0, column]) for column in range(3)] == [*PALETTE, (255, 255, 255)]
    grey = Image.fromarray(np.full((2, 3, 3), 100, np.uint8))
    found = np.array(overlay(grey, MASK, PALETTE)).astype(int)
    assert tuple(found[0, 2]) == (100, 100, 100)  # no class
    assert abs(found[0, 1] - (0.4 * 100 + 0.6 * np.array(PALETTE[1]))).max() <= 1


def test_pictures_have_the_class_of_the_largest_score_and_are_made_small(tmp_path):
    """The network returns the colours as scores, so the prediction is the brightest of red, green and blue."""
    levels = np.random.default_rng(0).permuted(np.tile(np.array([0, 100, 200], np.uint8), (600, 1024, 1)), axis=2)
    parts = {"image": (levels[:20, :30], levels), "mask": (levels[:20, :30].argmax(2), levels.argmax(2))}
    files = {name: [tmp_path / f"{name}-{number}.png" for number in range(2)] for name in parts}
    for name, arrays in parts.items():
        for path, array in zip(files[name], arrays, strict=True):
            Image.fromarray(array.astype(np.uint8)).save(path)
    labels, table = torch.zeros(2, dtype=torch.long), ClassTable.of_ids({0: "red", 1: "green", 2: "blue"})
    split = MaskFiles(files["image"], labels, files["mask"], table)
    preprocessing = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    loader, windows = LoaderConfig(1, 0, 0, torch.device("cpu"), preprocessing), SlidingWindowConfig("slide", 512, 400)
    found = prediction_pngs(lambda seen: seen, split, Source("", table.names, {}), loader, Config(), windows)
    pictures = {name: Image.open(io.BytesIO(content)) for name, content in found.items()}
    names = ("image", "truth", "prediction")
    assert [*pictures] == [f"predictions/{number}-{name}.png" for number in ("01", "02") for name in names]
    assert [picture.size for picture in pictures.values()] == [(30, 20)] * 3 + [(512, 300)] * 3
    for number in ("01", "02"):
        truth, prediction = (np.array(pictures[f"predictions/{number}-{name}.png"]) for name in names[1:])
        assert np.array_equal(truth, prediction)
    assert np.array_equal(np.array(pictures["predictions/01-truth.png"]), parts["mask"][0])
