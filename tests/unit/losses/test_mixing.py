import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pdvit.losses import mixing_loss

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 7), st.integers(0, 2**32))
few = settings(max_examples=30, deadline=None)


def make(images: int, count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, count, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(classes, (images, count), generator=generator)


def literal(logits: Tensor, targets: Tensor) -> float:
    """Mean over images of 1/n sum_i CE, patch by patch; targets are probabilities."""
    total, patches = 0.0, 0
    for image, labels in zip(logits.tolist(), targets.tolist(), strict=True):
        for scores, probabilities in zip(image, labels, strict=True):
            whole = sum(math.exp(score) for score in scores)
            terms = zip(scores, probabilities, strict=True)
            total -= sum(share * math.log(math.exp(score) / whole) for score, share in terms)
            patches += 1
    return total / patches


@few
@given(shape=SHAPES)
def test_equals_the_formula_patch_by_patch(shape):
    logits, targets = make(*shape)
    expected = literal(logits, F.one_hot(targets, shape[2]).double())
    assert mixing_loss(logits, targets).item() == pytest.approx(expected)


@few
@given(shape=SHAPES)
def test_soft_targets_equal_the_formula(shape):
    logits, _ = make(*shape)
    soft = make(*shape[:3], seed=shape[3] + 1)[0].softmax(-1)
    assert mixing_loss(logits, soft).item() == pytest.approx(literal(logits, soft))


@few
@given(shape=SHAPES)
def test_indices_equal_one_hot_probabilities(shape):
    logits, targets = make(*shape)
    one_hot = F.one_hot(targets, shape[2]).double()
    torch.testing.assert_close(mixing_loss(logits, targets), mixing_loss(logits, one_hot))


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_head_that_knows_nothing_gives_ln_c(classes):
    _, targets = make(2, 5, classes)
    assert mixing_loss(torch.zeros(2, 5, classes), targets).item() == pytest.approx(math.log(classes))


def test_every_patch_is_judged_by_its_own_target():
    logits = torch.full((1, 2, 3), -50.0)
    logits[0, 0, 2] = logits[0, 1, 0] = 50
    assert mixing_loss(logits, torch.tensor([[2, 0]])).item() == pytest.approx(0)
    assert mixing_loss(logits, torch.tensor([[2, 1]])).item() == pytest.approx(50)


def test_patches_swap_with_their_targets():
    logits, targets = make(2, 6, 4)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(mixing_loss(logits[:, order], targets[:, order]), mixing_loss(logits, targets))


def test_gradient_equals_finite_differences():
    logits, targets = make(2, 3, 4)
    assert torch.autograd.gradcheck(lambda logits: mixing_loss(logits, targets), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_short_numbers_are_computed_in_float32(dtype, autocast):
    logits, targets = make(2, 8, 10)
    leaf = logits.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = mixing_loss(leaf, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = literal(leaf.detach(), F.one_hot(targets, 10).double())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("scale", [1e6, -1e6, 1e-30, 0])
def test_value_and_gradient_are_finite(autocast, scale):
    logits, targets = make(2, 5, 6)
    leaf = (scale * logits.float()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = mixing_loss(leaf, targets)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()


def test_float64_stays_float64():
    logits, targets = make(1, 2, 3)
    assert mixing_loss(logits, targets).dtype == torch.float64
