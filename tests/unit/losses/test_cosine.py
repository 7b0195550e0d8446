import pytest
import torch
from torch.nn.functional import cosine_similarity

from pdvit.losses import cosine_loss


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
