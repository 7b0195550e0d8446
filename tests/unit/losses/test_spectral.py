import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from pdvit.losses import cosine_loss, spectral_loss

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
few = settings(max_examples=30, deadline=None)


def gaussian(images: int, count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, count, width, dtype=torch.float64, generator=generator)


@few
@given(SHAPES)
def test_equals_the_sum_of_the_squared_eigenvalues(shape):
    last = gaussian(*shape)
    unit = normalize(last, dim=-1)
    shares = torch.linalg.eigvalsh(unit @ unit.mT / shape[1])
    torch.testing.assert_close(shares.sum(-1), torch.ones(shape[0], dtype=torch.float64))
    torch.testing.assert_close(spectral_loss(last), shares.square().sum(-1).mean())


@few
@given(SHAPES)
def test_lies_between_its_bounds(shape):
    low = 1 / min(shape[1:3])
    assert low - 1e-12 <= spectral_loss(gaussian(*shape)).item() <= 1 + 1e-12


def test_is_soft_orthogonality_up_to_constants():
    last, count = gaussian(1, 7, 5), 7
    unit = normalize(last[0], dim=-1)
    soft = (unit @ unit.T - torch.eye(count, dtype=torch.float64)).square().sum()
    torch.testing.assert_close(spectral_loss(last), (soft + count) / count**2)


def test_is_at_least_the_square_of_the_mean_cosine():
    last, count = gaussian(1, 7, 5), 7
    p = cosine_loss(last).item()
    assert spectral_loss(last).item() >= (1 + (count - 1) * p**2) / count


@pytest.mark.parametrize(("count", "width"), [(3, 8), (8, 8)])
def test_orthogonal_patches_reach_the_least_value(count, width):
    assert spectral_loss(5 * torch.eye(width)[None, :count]).item() == pytest.approx(1 / count)


def test_patches_that_fill_a_narrow_space_evenly_reach_the_least_value():
    assert spectral_loss(torch.eye(4).repeat(3, 1)[None]).item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 4, 9), (1, 1, 3)])
def test_parallel_patches_give_one(shape):
    signs = (-1) ** torch.arange(shape[1])[:, None]
    assert spectral_loss(signs * torch.full(shape, 0.3)).item() == pytest.approx(1)


def test_one_patch_has_no_gradient():
    last = torch.full((2, 1, 4), 0.7, requires_grad=True)
    spectral_loss(last).backward()
    assert last.grad.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5)])
def test_gradient_equals_finite_differences(shape):
    assert torch.autograd.gradcheck(spectral_loss, gaussian(*shape, seed=3).requires_grad_())


def test_a_step_against_the_gradient_spreads_the_patches():
    last = (1 + 0.1 * torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = spectral_loss(last)
    before.backward()
    assert spectral_loss(last.detach() - 0.1 * last.grad) < before
