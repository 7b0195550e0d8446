import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pdvit.errors import UserError
from pdvit.losses import cosine_loss

VARIANTS = ("paper", "v1", "diverse-vit")
SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(1, 6), st.integers(0, 2**32))
few = settings(max_examples=30, deadline=None)


def test_is_the_mean_over_images_and_pairs_of_different_patches():
    last = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines = cosine_similarity(last[:, :, None], last[:, None], dim=-1).abs()
    off_diagonal = ~torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(cosine_loss(last), cosines[:, off_diagonal].mean())


def test_takes_the_absolute_value():
    assert cosine_loss(torch.tensor([[[2.0, 0.0], [-1.0, 0.0]]])).item() == pytest.approx(1)


def test_collapsed_patches_give_one():
    assert cosine_loss(torch.ones(2, 9, 4)).item() == pytest.approx(1)


def test_one_patch_gives_zero_and_no_gradient():
    last = torch.ones(2, 1, 4, requires_grad=True)
    loss = cosine_loss(last)
    loss.backward()
    assert loss.item() == 0
    assert (last.grad == 0).all()


def test_gradient_equals_finite_differences():
    last = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(cosine_loss, last)


def test_a_step_against_the_gradient_spreads_the_patches():
    last = (1 + 0.1 * torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = cosine_loss(last)
    before.backward()
    assert cosine_loss(last.detach() - 0.1 * last.grad) < before


def literal(last: Tensor, diagonal: bool) -> float:
    """Mean of u_i . u_j by two loops, signed; over i != j unless with the diagonal."""
    values = []
    for image in last.tolist():
        unit = [[x / math.hypot(*token) for x in token] for token in image]
        pairs = [(a, b) for i, a in enumerate(unit) for j, b in enumerate(unit) if diagonal or i != j]
        values.append(sum(math.fsum(x * y for x, y in zip(a, b, strict=True)) for a, b in pairs) / len(pairs))
    return sum(values) / len(values)


def gaussian(images: int, count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, count, width, dtype=torch.float64, generator=generator)


@few
@given(SHAPES)
def test_v1_keeps_the_sign_and_leaves_out_the_diagonal(shape):
    last = gaussian(*shape)
    assert cosine_loss(last, "v1").item() == pytest.approx(literal(last, diagonal=False), abs=1e-12)


@few
@given(SHAPES)
def test_diverse_vit_keeps_the_sign_and_the_diagonal(shape):
    last = gaussian(*shape)
    assert cosine_loss(last, "diverse-vit").item() == pytest.approx(literal(last, diagonal=True), abs=1e-12)


@few
@given(SHAPES)
def test_the_diagonal_makes_n_minus_1_times_v1_plus_1_over_n(shape):
    last, count = gaussian(*shape), shape[1]
    v1 = cosine_loss(last, "v1").item()
    assert cosine_loss(last, "diverse-vit").item() == pytest.approx(((count - 1) * v1 + 1) / count, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_patches_give_one_in_every_variant(variant):
    assert cosine_loss(torch.full((2, 9, 4), 0.3), variant).item() == pytest.approx(1)


def test_opposite_patches_are_alike_only_without_the_sign():
    last = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    found = [cosine_loss(last, variant).item() for variant in VARIANTS]
    assert found == pytest.approx([1, -1, 0])


@pytest.mark.parametrize(("variant", "value"), [("paper", 0), ("v1", 0), ("diverse-vit", 1)])
def test_one_patch_has_a_fixed_value_and_no_gradient(variant, value):
    last = torch.full((2, 1, 4), 0.7, requires_grad=True)
    loss = cosine_loss(last, variant)
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert last.grad.abs().max() < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_every_variant_equals_finite_differences(variant):
    last = gaussian(2, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda tokens: cosine_loss(tokens, variant), last)


@pytest.mark.parametrize("variant", ["released", "papr"])
def test_a_variant_without_a_cosine_term_is_refused(variant):
    with pytest.raises(UserError, match=variant) as caught:
        cosine_loss(torch.ones(1, 2, 3), variant)
    assert "paper" in caught.value.tip
