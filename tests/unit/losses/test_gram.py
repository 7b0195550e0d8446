import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pdvit import similarity
from pdvit.config.schema import GRAM_VARIANTS
from pdvit.errors import UserError
from pdvit.losses.gram import gram_loss


def literal(last: Tensor, anchor: Tensor, variant: str) -> Tensor:
    """The paper's formula with whole matrices, and the steps that the released code takes before."""
    student, teacher = F.normalize(last, dim=-1), F.normalize(anchor, dim=-1)
    if variant == "batch":
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    ours, theirs = student @ student.mT, teacher @ teacher.mT
    if variant.startswith("remove"):
        theirs = torch.where(theirs < 0, 0, theirs)
    if variant == "remove-neg":
        ours = torch.where(ours < 0, 0, ours)
    norms = torch.linalg.matrix_norm(ours - theirs, "fro") ** 2
    return norms.mean() / ours.shape[-1] ** 2


def tokens(seed: int, images: int, count: int, width: int, theirs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (images, count, width), (images, count, theirs)
    last, anchor = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return last.requires_grad_(), anchor


@pytest.mark.parametrize("variant", GRAM_VARIANTS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), shape=st.tuples(*map(st.integers, (1,) * 4, (3, 9, 6, 6))), block=st.integers(1, 300))
def test_value_and_gradient_equal_the_literal_form_in_blocks_of_any_size(variant, seed, shape, block):
    last, anchor = tokens(seed, *shape)
    expected = literal(last, anchor, variant)
    (slope,) = torch.autograd.grad(expected, last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "BLOCK_ENTRIES", block)
        found = gram_loss(last, anchor.requires_grad_(), variant)
        gradient, none = torch.autograd.grad(found, (last, anchor), allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    length = last.detach().norm(dim=-1, keepdim=True)  # the gradient, and its rounding, grow with 1 / length
    torch.testing.assert_close(gradient * length, slope * length, rtol=1e-9, atol=1e-14)
    assert none is None  # no gradient flows into the anchor


def test_values_worked_by_hand():
    """Cosines 1 and -1 of last against 1 and 0: two of four pairs differ by 1, of the variants by 0 or 1."""
    last, anchor = torch.tensor([[[2.0], [-3.0]]]), 5 * torch.eye(2)[None]
    expected = {"paper": 1 / 2, "remove-neg": 0, "remove-only-teacher-neg": 1 / 2, "batch": 1 / 2}
    assert {variant: gram_loss(last, anchor, variant).item() for variant in expected} == expected
    opposite = gram_loss(torch.ones(1, 2, 1), last).item()  # all that can be: 0, 2, 2, 0
    assert opposite == 2
    # the same pairs on a grid twice as large: the mean stays, the sum of the paper grows
    assert gram_loss(last.repeat(1, 4, 1), anchor.repeat(1, 4, 1)).item() == 1 / 2


def test_equal_relations_are_free_whatever_the_size_the_rotation_and_the_width():
    last, _ = tokens(0, 2, 9, 4, 4)
    rotation = torch.linalg.qr(tokens(1, 1, 7, 7, 1)[0][0]).Q[:4]
    assert gram_loss(last, 3 * last @ rotation).item() < 1e-30
    near = gram_loss(last.float(), (last + 1e-5 * last.roll(1, 1)).float()).item()
    assert near == pytest.approx(gram_loss(last, last + 1e-5 * last.roll(1, 1)).item(), rel=0.1)  # it does not cancel


@pytest.mark.parametrize("shape", [(2, 8, 4), (1, 9, 4)])
def test_other_images_or_another_grid_are_refused(shape):
    with pytest.raises(UserError, match=rf"\({shape[0]}, {shape[1]}\).*for tokens of \(2, 9\)"):
        gram_loss(torch.ones(2, 9, 4), torch.ones(shape))
