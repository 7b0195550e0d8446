import io

import numpy as np
import torch
from PIL import Image

from pdvit.tasks.pictures import LONGEST_SIDE, overlay, palette_image, png, predict_mask, thumbnail
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


def test_pictures_are_made_small_and_masks_keep_their_values():
    large = torch.zeros(LONGEST_SIDE, 2 * LONGEST_SIDE, dtype=torch.uint8)
    large[:, LONGEST_SIDE:] = 1
    small = thumbnail(palette_image(large, PALETTE))
    assert small.size == (LONGEST_SIDE, LONGEST_SIDE // 2)
    assert set(np.unique(np.array(small))) == {0, 1}
    image = Image.new("RGB", (30, 20))
    assert thumbnail(image) is image


def test_the_predicted_class_is_that_of_the_largest_score():
    image = torch.randn(1, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    mask = predict_mask(lambda seen: seen, image, (10, 12), 3, SlidingWindowConfig("slide", 8, 4))
    assert mask.dtype == torch.uint8
    assert torch.equal(mask.long(), image[0].argmax(0))
