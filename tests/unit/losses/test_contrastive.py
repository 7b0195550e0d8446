import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdvit.errors import UserError
from pdvit.losses import VARIANTS, contrastive_loss

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 8), st.integers(1, 6), st.integers(0, 2**32))
few = settings(max_examples=30, deadline=None)


def gaussian(images: int, count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, last = torch.randn(2, images, count, width, dtype=torch.float64, generator=generator)
    return first, last


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def literal(first: Tensor, last: Tensor, variant: str) -> float:
    """The formula of v3 as written, patch by patch; in v1 the negative is the mean over all patches."""
    if variant == "diverse-vit":
        first, last = (tokens / tokens.norm(dim=-1, keepdim=True) for tokens in (first, last))
    total = 0.0
    images, count, width = last.shape
    for f, h in zip(first.tolist(), last.tolist(), strict=True):
        for i in range(count):
            among = [j for j in range(count) if j != i or variant == "v1"]
            mean = [sum(h[j][k] for j in among) / len(among) for k in range(width)]
            positive, negative = math.exp(dot(f[i], h[i])), math.exp(dot(f[i], mean))
            total -= math.log(positive / (positive + negative))
    return total / (images * count)


@pytest.mark.parametrize("variant", ["paper", "v1", "diverse-vit"])
@few
@given(shape=SHAPES)
def test_equals_the_formula_patch_by_patch(variant, shape):
    first, last = gaussian(*shape)
    assert contrastive_loss(first, last, variant).item() == pytest.approx(literal(first, last, variant), rel=1e-10)


@pytest.mark.parametrize("variant", ["paper", "v1", "diverse-vit"])
@few
@given(shape=SHAPES)
def test_collapse_of_the_last_layer_gives_ln_2(variant, shape):
    first, last = gaussian(*shape)
    collapsed = last[:, :1].expand_as(last)
    assert contrastive_loss(first, collapsed, variant).item() == pytest.approx(math.log(2))


def test_value_worked_by_hand():
    # f.l against f.m: 1*2 against 1*4, then 3*4 against 3*2
    first, last = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [4.0]]])
    expected = (math.log1p(math.exp(4 - 2)) + math.log1p(math.exp(6 - 12))) / 2
    assert contrastive_loss(first, last).item() == pytest.approx(expected)


@pytest.mark.parametrize("count", [2, 5, 196])
def test_argument_is_that_of_v1_times_n_over_n_minus_1(count):
    # all patches but one have no first token, so the loss of the batch gives away the argument of that one
    first, last = gaussian(1, count, 4)
    first[:, 1:] = 0
    alone = contrastive_loss(first, last).item() * count - (count - 1) * math.log(2)
    v1 = dot(first[0, 0].tolist(), (last.mean(1)[0] - last[0, 0]).tolist())
    assert math.log(math.expm1(alone)) == pytest.approx(v1 * count / (count - 1))


def test_huge_tokens_keep_their_value():
    first, last = torch.tensor([[[1e6], [1e6]]]), torch.tensor([[[1e6], [-1e6]]])
    # patch 1 matches itself (0), patch 2 points the wrong way by 2e12
    assert contrastive_loss(first, last).item() == pytest.approx(1e12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_diverse_vit_has_a_gradient_for_the_first_layer_unless_asked(variant):
    first, last = (tokens.requires_grad_() for tokens in gaussian(2, 4, 3))
    gradients = []
    for detach in (None, True, False):
        first.grad = last.grad = None
        loss = contrastive_loss(first, last, variant, detach_first=detach)
        loss.backward()
        assert (first.grad is None) == (variant != "diverse-vit" if detach is None else detach)
        gradients.append((loss.detach(), last.grad))
    torch.testing.assert_close(gradients[1:], [gradients[0]] * 2, rtol=0, atol=0)


def window_of(i: int, rows: int, columns: int) -> list[int]:
    """The other patches of the 7 x 7 window around patch i that lie on the grid."""
    row, column = divmod(i, columns)
    inside = [(r, c) for r in range(row - 3, row + 4) for c in range(column - 3, column + 4)]
    return [r * columns + c for r, c in inside if 0 <= r < rows and 0 <= c < columns and (r, c) != (row, column)]


def literal_released(first: Tensor, last: Tensor, rows: int, columns: int) -> float:
    """Three logits, patch by patch: the local mean divides by 48 also where the window is cut off."""
    total = 0.0
    images, count, width = last.shape
    for f, h in zip(first.tolist(), last.tolist(), strict=True):
        for i in range(count):
            others = [sum(h[j][k] for j in range(count) if j != i) / (count - 1) for k in range(width)]
            nearby = [sum(h[j][k] for j in window_of(i, rows, columns)) / 48 for k in range(width)]
            positive, far, near = (math.exp(dot(f[i], other)) for other in (h[i], others, nearby))
            total -= math.log(positive / (positive + far + near) + 1e-8)
    return total / (images * count)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 5), (9, 8), (1, 9)])
def test_released_equals_its_formula_patch_by_patch(rows, columns):
    first, last = gaussian(2, rows * columns, 3)
    found = contrastive_loss(first, last, "released", grid=(rows, columns)).item()
    assert found == pytest.approx(literal_released(first, last, rows, columns), rel=1e-10)


def released_alone(s: float, at: int, rows: int = 14, columns: int = 14) -> float:
    """The released term of one patch of collapsed tokens with f . l = s: the mean with all other patches' f at 0."""
    count = rows * columns
    first, last = torch.zeros(1, count, 1, dtype=torch.float64), torch.ones(1, count, 1, dtype=torch.float64)
    first[0, at] = s
    # f = 0 gives three equal logits, so the others are ln 3 each (but for the guard)
    total = contrastive_loss(first, last, "released", grid=(rows, columns)).item() * count
    return total + (count - 1) * math.log(1 / 3 + 1e-8)


@pytest.mark.parametrize("s", [0.5, 3.0, 12.0])
@pytest.mark.parametrize(
    ("row", "column", "weight"),
    [
        (0, 0, 0.3125),
        (13, 13, 0.3125),
        (0, 7, 0.5625),
        (7, 0, 0.5625),
        (1, 1, 24 / 48),
        (3, 3, 1.0),
        (7, 7, 1.0),
        (10, 10, 1.0),
    ],
)
def test_released_collapse_is_ln_3_inside_and_less_at_the_border(s, row, column, weight):
    # A constant map has the local mean `weight`: 1 inside, 15/48 in a corner, 27/48 in the middle of an edge.
    expected = -math.log(1 / (2 + math.exp((weight - 1) * s)) + 1e-8)
    assert released_alone(s, 14 * row + column) == pytest.approx(expected, abs=1e-9)
    if weight == 1:
        assert expected == pytest.approx(math.log(3), abs=1e-7)
    else:
        assert math.log(2) < expected < math.log(3)


@pytest.mark.parametrize(("s", "expected"), [(0.0, math.log(3)), (1e3, (64 * math.log(3) + 132 * math.log(2)) / 196)])
def test_released_collapse_on_a_14_by_14_grid_depends_on_the_size_of_the_tokens(s, expected):
    """Equal tokens with f . l = s average mean_i ln(2 + e^((r_i - 1) s)), r_i the border's weight.

    That is ln 3 for s = 0 and falls to (64 ln 3 + 132 ln 2) / 196 = 0.826 for large s: 8 x 8 patches lie inside.
    """
    last = torch.ones(1, 196, 1, dtype=torch.float64)
    assert contrastive_loss(s * last, last, "released").item() == pytest.approx(expected, abs=1e-6)
    assert (64 * math.log(3) + 132 * math.log(2)) / 196 == pytest.approx(0.826, abs=1e-3)


def test_released_is_bounded_by_its_guard():
    first, last = torch.tensor([[[1e3], [1e3]]]), torch.tensor([[[-1.0], [1.0]]])
    found = contrastive_loss(first, last, "released", grid=(1, 2)).item()
    assert found == pytest.approx((-math.log(1e-8) + 0) / 2, rel=1e-6)


def test_only_the_released_form_needs_the_grid():
    first, last = gaussian(2, 6, 3)
    assert contrastive_loss(first, last, "v1").isfinite()
    with pytest.raises(UserError, match="6 patches form no square") as caught:
        contrastive_loss(first, last, "released")
    assert "grid=" in caught.value.tip
    with pytest.raises(UserError, match="do not fill a grid of 2 rows and 4"):
        contrastive_loss(first, last, "released", grid=(2, 4))
