import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdvit.losses import koleo, koleo_loss

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 6), st.integers(0, 2**32))


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


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_equals_the_formula_patch_by_patch_whatever_the_lengths(shape):
    last = gaussian(*shape)
    lengths = torch.linspace(0.1, 9, shape[1], dtype=torch.float64)[:, None]
    assert koleo_loss(lengths * last).item() == pytest.approx(literal(last), rel=1e-9)


def test_blocks_of_rows_change_nothing(monkeypatch):
    last = gaussian(2, 9, 4)
    whole = koleo_loss(last)
    monkeypatch.setattr(koleo, "BLOCK_ENTRIES", 2 * 9 * 2)
    assert koleo_loss(last) == whole


@pytest.mark.parametrize(
    ("tokens", "distance"),
    [([[2.0, 0.0], [-1.0, 0.0]], 2), ([[1.0, 0.0], [0.0, 3.0]], math.sqrt(2)), ([[1.0, 1.0], [1.0, 1.0]], 1e-8)],
    ids=["opposite", "orthogonal", "equal"],
)
def test_values_worked_by_hand(tokens, distance):
    assert koleo_loss(torch.tensor([tokens])).item() == pytest.approx(-math.log(distance))
