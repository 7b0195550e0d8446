import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from pdvit.losses import spectral_loss

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))


def gaussian(images: int, count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, count, width, dtype=torch.float64, generator=generator)


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_equals_the_sum_of_the_squared_eigenvalues_within_its_bounds(shape):
    last = gaussian(*shape)
    unit = normalize(last, dim=-1)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.mT / shape[1])
    torch.testing.assert_close(eigenvalues.sum(-1), torch.ones(shape[0], dtype=torch.float64))
    torch.testing.assert_close(spectral_loss(last), eigenvalues.square().sum(-1).mean())
    assert 1 / min(shape[1:3]) - 1e-12 <= spectral_loss(last).item() <= 1 + 1e-12


def test_is_soft_orthogonality_up_to_constants():
    last, count = gaussian(1, 7, 5), 7
    unit = normalize(last[0], dim=-1)
    soft = (unit @ unit.T - torch.eye(count, dtype=torch.float64)).square().sum()
    torch.testing.assert_close(spectral_loss(last), (soft + count) / count**2)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (5 * torch.eye(8)[:3], 1 / 3),
        (torch.eye(8), 1 / 8),
        (torch.eye(4).repeat(3, 1), 1 / 4),
        (torch.tensor([[0.3, 0.3], [-0.3, -0.3], [0.6, 0.6]]), 1),
        (torch.zeros(3, 2), 0),
    ],
    ids=["orthogonal", "a whole basis", "a narrow space filled evenly", "parallel", "without direction"],
)
def test_values_worked_by_hand(tokens, value):
    assert spectral_loss(tokens[None]).item() == pytest.approx(value)
