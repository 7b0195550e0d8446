import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses.cross_entropy import cross_entropy_loss, pixel_loss

CLASSES = 4


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["images", "patches"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_indices_and_probabilities_equal_the_formula(shape, smoothing):
    logits, labels = gaussian(*shape), torch.arange(6).reshape(shape) % CLASSES
    one_hot = F.one_hot(labels, CLASSES).double()
    soft = (1 - smoothing) * one_hot + smoothing / CLASSES
    expected = -(soft * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy_loss(logits, labels, smoothing), expected)
    torch.testing.assert_close(cross_entropy_loss(logits, labels.int(), smoothing), expected)
    torch.testing.assert_close(cross_entropy_loss(logits, one_hot, smoothing), expected)
    torch.testing.assert_close(cross_entropy_loss(logits, one_hot.float(), smoothing), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_multi_label_targets_equal_the_binary_formula(dtype, smoothing):
    logits, several = gaussian(2), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=dtype)
    soft, p = several * (1 - smoothing) + smoothing / 2, logits.sigmoid()
    expected = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    torch.testing.assert_close(cross_entropy_loss(logits, several, smoothing, multi_label=True), expected)


@pytest.mark.parametrize("bad", [-100, -1, CLASSES, 1.5, -0.5, math.nan])
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["images", "patches"])
def test_an_index_or_probability_out_of_range_is_refused(shape, bad):
    labels = torch.zeros(shape, dtype=torch.long) if isinstance(bad, int) else torch.full((*shape, CLASSES), 0.25)
    labels[-1] = bad
    with pytest.raises(UserError, match=f"{bad}.* 4 classes") as caught:
        cross_entropy_loss(gaussian(*shape), labels)
    assert ("from 0 to 3" if isinstance(bad, int) else "from 0 to 1") in caught.value.tip


@pytest.mark.parametrize(
    ("shape", "multi_label"), [((4,), False), ((3, 3), False), ((3, 1), False), ((3,), True)], ids=str
)
def test_targets_of_another_shape_are_refused(shape, multi_label):
    with pytest.raises(UserError, match="shape"):
        cross_entropy_loss(gaussian(3), torch.zeros(shape, dtype=torch.long), multi_label=multi_label)


def test_the_range_is_checked_neither_off_the_cpu_which_would_wait_for_the_device_nor_without_images():
    logits, labels = torch.zeros(2, CLASSES, device="meta"), torch.full((2,), 9, device="meta")
    assert cross_entropy_loss(logits, labels).shape == ()
    assert cross_entropy_loss(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.long)).isnan()


def masked(seed: int, images: int, classes: int, height: int, width: int, ignored: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, height, width, generator=generator) * 3
    masks = torch.randint(classes, (images, height, width), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < ignored] = 255
    return logits, masks


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 5, 1, 6), (3, 2, 4, 1)], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_pixel_loss_is_the_sum_over_labelled_pixels_by_all_pixels(shape, ignored):
    logits, masks = masked(0, *shape, ignored)
    total = 0.0
    for b, y, x in product(*map(range, masks.shape)):
        if (label := int(masks[b, y, x])) != 255:
            row = logits[b, :, y, x].double()
            total -= float(row[label]) - math.log(sum(math.exp(value) for value in row))
    assert float(pixel_loss(logits, masks)) == pytest.approx(total / masks.numel(), rel=1e-5, abs=1e-6)


def test_pixel_losses_of_parts_add_up_and_pixels_without_a_label_have_no_gradient_also_if_deterministic():
    logits, masks = masked(0, 5, 3, 6, 6, 0.4)
    masks[0] = 255
    logits.requires_grad_()
    expected = pixel_loss(logits, masks)
    parts = sum(len(part) / 5 * pixel_loss(part, of) for part, of in zip(logits.split(2), masks.split(2), strict=True))
    torch.testing.assert_close(parts, expected)
    expected.backward()
    assert (logits.grad == 0).all(1).equal(masks == 255)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(pixel_loss(logits, masks), expected)
    finally:
        torch.use_deterministic_algorithms(False)
