import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdvit.losses import cosine_loss

VARIANTS = ("paper", "v1", "diverse-vit")
SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(1, 6), st.integers(0, 2**32))


def literal(last: Tensor, variant: str) -> float:
    """The mean of u_i . u_j by two loops: |.| for `paper`, with the diagonal for `diverse-vit`."""
    values = []
    for image in last.tolist():
        unit = [[x / math.hypot(*token) for x in token] for token in image]
        pairs = [(a, b) for i, a in enumerate(unit) for j, b in enumerate(unit) if variant == "diverse-vit" or i != j]
        cosines = [math.fsum(x * y for x, y in zip(a, b, strict=True)) for a, b in pairs]
        values.append(sum(abs(c) if variant == "paper" else c for c in cosines) / len(pairs))
    return sum(values) / len(values)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=30, deadline=None)
@given(shape=SHAPES)
def test_equals_the_formula_pair_by_pair(variant, shape):
    *size, seed = shape
    last = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert cosine_loss(last, variant).item() == pytest.approx(literal(last, variant), abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_patches_give_one(variant):
    assert cosine_loss(torch.full((2, 9, 4), 0.3), variant).item() == pytest.approx(1)


def test_opposite_patches_are_similar_only_without_the_sign():
    last = torch.tensor([[[2.0, 0.0], [-1.0, 0.0]]])
    assert [cosine_loss(last, variant).item() for variant in VARIANTS] == pytest.approx([1, -1, 0])
