import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdvit.losses import koleo, koleo_loss

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 6), st.integers(0, 2**32))
few = settings(max_examples=30, deadline=None)


def gaussian(images: int, count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, count, width, dtype=torch.float64, generator=generator)


def literal(last: Tensor) -> float:
    """-mean of ln of the distance to the nearest other point on the sphere, patch by patch."""
    losses = []
    for image in last.tolist():
        unit = [[x / math.hypot(*token) for x in token] for token in image]
        for i, one in enumerate(unit):
            losses.append(-math.log(min(math.dist(one, other) for j, other in enumerate(unit) if j != i)))
    return sum(losses) / len(losses)


@few
@given(SHAPES)
def test_equals_the_loop_over_patches(shape):
    last = gaussian(*shape)
    assert koleo_loss(last).item() == pytest.approx(literal(last), rel=1e-9)


def test_blocks_of_rows_change_nothing(monkeypatch):
    last = gaussian(2, 9, 4)
    whole = koleo_loss(last)
    monkeypatch.setattr(koleo, "BLOCK_ENTRIES", 2 * 9 * 2)
    assert koleo_loss(last) == whole


def test_only_directions_count():
    last = gaussian(2, 7, 5)
    sizes = torch.linspace(0.1, 9, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(koleo_loss(sizes * last), koleo_loss(last))


def test_images_do_not_meet():
    last = gaussian(3, 5, 4)
    alone = [koleo_loss(image[None]).item() for image in last]
    assert koleo_loss(last).item() == pytest.approx(sum(alone) / 3)
    assert koleo_loss(last[:1].repeat(2, 1, 1)).item() == pytest.approx(alone[0])


@pytest.mark.parametrize(
    ("tokens", "distance"),
    [([[2.0, 0.0], [-1.0, 0.0]], 2), ([[1.0, 0.0], [0.0, 3.0]], math.sqrt(2)), ([[1.0, 1.0], [1.0, 1.0]], 1e-8)],
    ids=["opposite", "orthogonal", "equal"],
)
def test_values_worked_by_hand(tokens, distance):
    assert koleo_loss(torch.tensor([tokens])).item() == pytest.approx(-math.log(distance))


def test_gradient_equals_finite_differences():
    assert torch.autograd.gradcheck(koleo_loss, gaussian(2, 5, 4, seed=3).requires_grad_())


def test_a_step_against_the_gradient_moves_near_patches_apart():
    last = (1 + 0.1 * torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = koleo_loss(last)
    before.backward()
    assert koleo_loss(last.detach() - 0.01 * last.grad) < before


def test_one_patch_gives_zero_and_no_gradient():
    last = torch.ones(2, 1, 4, requires_grad=True)
    loss = koleo_loss(last)
    loss.backward()
    assert loss.item() == 0
    assert (last.grad == 0).all()
