import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdvit.losses.pixels import pixel_loss


def made(seed: int, images: int, classes: int, height: int, width: int, ignored: float):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, height, width, generator=generator, dtype=torch.float32) * 3
    masks = torch.randint(classes, (images, height, width), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < ignored] = 255
    return logits, masks


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(2, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_it_is_the_sum_over_labelled_pixels_by_all_pixels(seed, images, classes, height, width, ignored):
    logits, masks = made(seed, images, classes, height, width, ignored)
    total = 0.0
    for b in range(images):
        for y in range(height):
            for x in range(width):
                if (label := int(masks[b, y, x])) != 255:
                    row = logits[b, :, y, x].double()
                    total -= float(row[label]) - math.log(sum(math.exp(value) for value in row))
    assert float(pixel_loss(logits, masks)) == pytest.approx(total / masks.numel(), rel=1e-5, abs=1e-6)


def test_parts_of_a_batch_add_up_by_their_images():
    logits, masks = made(0, 5, 3, 6, 6, 0.4)
    masks[0] = 255
    parts = sum(len(part) / 5 * pixel_loss(part, of) for part, of in zip(logits.split(2), masks.split(2), strict=True))
    torch.testing.assert_close(parts, pixel_loss(logits, masks))


def test_no_label_at_all_gives_nothing_to_learn():
    logits, masks = made(0, 2, 3, 4, 4, 1.0)
    logits.requires_grad_()
    loss = pixel_loss(logits, masks)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_deterministic_mode_gives_the_same():
    logits, masks = made(0, 2, 3, 8, 8, 0.3)
    expected = pixel_loss(logits, masks)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(pixel_loss(logits, masks), expected)
    finally:
        torch.use_deterministic_algorithms(False)
