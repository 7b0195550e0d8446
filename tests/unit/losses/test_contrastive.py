import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdvit.losses import contrastive_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 8), st.integers(1, 6), st.integers(0, 2**32))
few = settings(max_examples=30, deadline=None)


def gaussian(images: int, count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, last = torch.randn(2, images, count, width, dtype=torch.float64, generator=generator)
    return first, last


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def literal(first: Tensor, last: Tensor) -> float:
    """The formula of v3 as written, patch by patch."""
    total = 0.0
    images, count, width = last.shape
    for f, h in zip(first.tolist(), last.tolist(), strict=True):
        for i in range(count):
            others = [sum(h[j][k] for j in range(count) if j != i) / (count - 1) for k in range(width)]
            positive, negative = math.exp(dot(f[i], h[i])), math.exp(dot(f[i], others))
            total -= math.log(positive / (positive + negative))
    return total / (images * count)


def inverse_softplus(loss: float) -> float:
    return math.log(math.expm1(loss))


@few
@given(shape=SHAPES)
def test_equals_the_formula_patch_by_patch(shape):
    first, last = gaussian(*shape)
    assert contrastive_loss(first, last).item() == pytest.approx(literal(first, last), rel=1e-10)


def test_value_worked_by_hand():
    # f.l against f.m: 1*2 against 1*4, then 3*4 against 3*2
    first, last = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [4.0]]])
    expected = (math.log1p(math.exp(4 - 2)) + math.log1p(math.exp(6 - 12))) / 2
    assert contrastive_loss(first, last).item() == pytest.approx(expected)


def test_float32_equals_the_formula():
    first, last = (tokens.float() for tokens in gaussian(2, 9, 5))
    found = contrastive_loss(first, last)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(literal(first, last), rel=1e-5)


@few
@given(shape=SHAPES)
def test_collapse_of_the_last_layer_gives_ln_2(shape):
    first, last = gaussian(*shape)
    assert contrastive_loss(first, last[:, :1].expand_as(last)).item() == pytest.approx(math.log(2))


@few
@given(shape=SHAPES)
def test_is_the_softplus_of_negative_minus_positive(shape):
    first, last = gaussian(*shape)
    others = torch.stack([last[:, [j for j in range(shape[1]) if j != i]].mean(1) for i in range(shape[1])], 1)
    argument = (first * others).sum(-1) - (first * last).sum(-1)
    torch.testing.assert_close(contrastive_loss(first, last), torch.log1p(argument.exp()).mean())


@pytest.mark.parametrize("count", [2, 5, 196])
def test_argument_is_that_of_v1_times_n_over_n_minus_1(count):
    # all patches but one have no first token, so the loss of the batch gives away the argument of that one
    first, last = gaussian(1, count, 4)
    first[:, 1:] = 0
    alone = contrastive_loss(first, last).item() * count - (count - 1) * math.log(2)
    v1 = dot(first[0, 0].tolist(), (last.mean(1)[0] - last[0, 0]).tolist())
    assert inverse_softplus(alone) == pytest.approx(v1 * count / (count - 1))


def test_products_are_raw():
    first, last = gaussian(2, 6, 5)
    assert contrastive_loss(3 * first, last).item() == pytest.approx(literal(3 * first, last))
    assert contrastive_loss(first, 3 * last).item() == pytest.approx(contrastive_loss(3 * first, last).item())


def test_images_do_not_meet():
    first, last = gaussian(3, 5, 4)
    alone = [contrastive_loss(f[None], h[None]).item() for f, h in zip(first, last, strict=True)]
    assert contrastive_loss(first, last).item() == pytest.approx(sum(alone) / 3)


def test_the_first_layer_gets_no_gradient_unless_asked():
    first, last = (tokens.requires_grad_() for tokens in gaussian(2, 4, 3))
    contrastive_loss(first, last).backward()
    assert first.grad is None
    assert last.grad.abs().sum() > 0
    contrastive_loss(first, last, detach_first=False).backward()
    assert first.grad.abs().sum() > 0


def test_the_stop_changes_no_value_and_no_gradient_of_the_last_layer():
    first, last = gaussian(2, 4, 3)
    found = []
    for detach in (True, False):
        leaf = last.clone().requires_grad_()
        loss = contrastive_loss(first.clone().requires_grad_(), leaf, detach_first=detach)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("count", [2, 6])
def test_gradient_equals_finite_differences(count):
    first, last = (tokens.requires_grad_() for tokens in gaussian(2, count, 3))
    assert torch.autograd.gradcheck(lambda f, h: contrastive_loss(f, h, detach_first=False), (first, last))
    assert torch.autograd.gradcheck(lambda h: contrastive_loss(first.detach(), h), last)


@DTYPES
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("case", ["zero", "tiny", "huge", "identical"])
def test_value_and_gradient_are_finite(dtype, autocast, case):
    # fp16 ends at 65504 and its smallest number is 6e-8
    tiny, huge = (1e-7, 6e4 / 5) if dtype == torch.float16 else (1e-30, 1e6)
    first, last = gaussian(2, 6, 5)
    scale = {"zero": 0, "tiny": tiny, "huge": huge, "identical": 1}[case]
    if case == "identical":
        first, last = torch.ones_like(first), torch.ones_like(last)
    first, last = ((scale * tokens).to(dtype).requires_grad_() for tokens in (first, last))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = contrastive_loss(first, last, detach_first=False)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert first.grad.isfinite().all()
    assert last.grad.isfinite().all()


def test_huge_tokens_keep_their_value():
    first, last = torch.tensor([[[1e6], [1e6]]]), torch.tensor([[[1e6], [-1e6]]])
    # patch 1 knows itself (0), patch 2 points the wrong way by 2e12
    assert contrastive_loss(first, last).item() == pytest.approx(1e12)


@DTYPES
def test_autocast_changes_nothing(dtype):
    first, last = (tokens.to(dtype) for tokens in gaussian(2, 9, 8))
    expected = contrastive_loss(first, last)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive_loss(first, last).item() == expected.item()


def test_one_patch_gives_zero_and_no_gradient():
    first, last = (tokens.requires_grad_() for tokens in gaussian(3, 1, 4))
    loss = contrastive_loss(first, last, detach_first=False)
    loss.backward()
    assert loss.item() == 0
    assert (first.grad == 0).all()
    assert (last.grad == 0).all()
