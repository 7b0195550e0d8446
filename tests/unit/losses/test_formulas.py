"""Terms of tokens against their formulas, written with loops, and against values worked by hand."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from pdvit import similarity
from pdvit.config.schema import VARIANTS
from pdvit.losses import contrastive_loss, cosine_loss, koleo_loss, spectral_loss, terms
from tests.errors import refused

Tokens = list[list[float]]  # the patches of one image
WITH_COSINE = [variant for variant in VARIANTS if variant != "released"]
LN_2, LN_3 = math.log(2), math.log(3)


def gaussian(images: int, count: int, width: int, seed: int = 0) -> Tensor:
    """First and last patch tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, images, count, width, dtype=torch.float64, generator=generator)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def at_length_one(image: Tokens) -> Tokens:
    return [[x / math.hypot(*token) for x in token] for token in image]


def cosine_by_pairs(first: Tokens, last: Tokens, grid: tuple[int, int], variant: str) -> float:
    """The mean of u_i . u_j: of its absolute value for `paper`, with the diagonal for `diverse-vit`."""
    unit, diagonal = at_length_one(last), variant == "diverse-vit"
    cosines = [dot(a, b) for i, a in enumerate(unit) for j, b in enumerate(unit) if diagonal or i != j]
    return sum(abs(c) if variant == "paper" else c for c in cosines) / len(cosines)


def window_of(i: int, rows: int, columns: int) -> list[int]:
    """The other patches of the 7 x 7 window around patch i that lie on the grid."""
    row, column = divmod(i, columns)
    inside = [(r, c) for r in range(row - 3, row + 4) for c in range(column - 3, column + 4)]
    return [r * columns + c for r, c in inside if 0 <= r < rows and 0 <= c < columns and (r, c) != (row, column)]


def contrastive_by_patches(first: Tokens, last: Tokens, grid: tuple[int, int], variant: str) -> float:
    """v3 as written; in v1 the negative is the mean over all patches, and `released` has a local one and a guard."""
    if variant == "diverse-vit":
        first, last = at_length_one(first), at_length_one(last)
    total = 0.0
    for i, f in enumerate(first):
        among = [j for j in range(len(last)) if j != i or variant == "v1"]
        negatives = [(among, len(among))]
        if variant == "released":  # divides by 48 also if the window is cut off
            negatives.append((window_of(i, *grid), 48))
        means = [[sum(last[j][k] for j in of) / size for k in range(len(f))] for of, size in negatives]
        positive = math.exp(dot(f, last[i]))
        share = positive / (positive + sum(math.exp(dot(f, mean)) for mean in means))
        total -= math.log(share + (1e-8 if variant == "released" else 0))
    return total / len(first)


def koleo_by_patches(first: Tokens, last: Tokens, grid: tuple[int, int]) -> float:
    """-mean of ln of the distance to the nearest other point on the sphere."""
    unit = at_length_one(last)
    distances = [min(math.dist(a, b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    return -sum(map(math.log, distances)) / len(unit)


def purity(first: Tokens, last: Tokens, grid: tuple[int, int]) -> float:
    """The sum of the squared eigenvalues of U U^T / n, which add up to 1."""
    unit = torch.tensor(at_length_one(last), dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / len(unit))
    assert eigenvalues.sum().item() == pytest.approx(1)
    return eigenvalues.square().sum().item()


FORMULAS = {
    **{f"cosine {v}": (partial(cosine_loss, variant=v), partial(cosine_by_pairs, variant=v)) for v in WITH_COSINE},
    **{
        f"contrastive {v}": (partial(contrastive_loss, variant=v), partial(contrastive_by_patches, variant=v))
        for v in VARIANTS
    },
    "koleo": (koleo_loss, koleo_by_patches),
    "spectral": (spectral_loss, purity),
}


def test_every_term_of_the_last_layer_has_a_formula():
    assert set(terms.LAST_LAYER_TERMS) <= set(FORMULAS)


@pytest.mark.parametrize("form", FORMULAS)
@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (2, 3), (1, 9), (9, 8)], ids=str)
@pytest.mark.parametrize(("images", "width"), [(3, 2), (1, 6), (2, 3)])
def test_a_term_equals_its_formula_patch_by_patch(form, grid, images, width):
    loss, formula = FORMULAS[form]
    both = gaussian(images, grid[0] * grid[1], width, seed=width)
    if form.startswith("contrastive"):
        found = loss(*both, **({"grid": grid} if "released" in form else {}))
    else:
        found = loss(both[1])
    expected = sum(formula(first.tolist(), last.tolist(), grid) for first, last in both.unbind(1)) / images
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


EQUAL = torch.full((9, 4), 0.3)
OPPOSITE = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])


@pytest.mark.parametrize(
    ("form", "last", "value"),
    [
        *((f"cosine {variant}", EQUAL, 1) for variant in WITH_COSINE),
        *(("cosine paper", OPPOSITE, 1), ("cosine v1", OPPOSITE, -1), ("cosine diverse-vit", OPPOSITE, 0)),
        *((f"contrastive {variant}", EQUAL, LN_2) for variant in WITH_COSINE),
        *(("koleo", OPPOSITE, -LN_2), ("koleo", torch.eye(2) * 3, -LN_2 / 2), ("koleo", EQUAL, -math.log(1e-8))),
        *(("spectral", EQUAL, 1), ("spectral", OPPOSITE, 1), ("spectral", torch.zeros(3, 2), 0)),
        *(("spectral", 5 * torch.eye(8)[:3], 1 / 3), ("spectral", torch.eye(4).repeat(3, 1), 1 / 4)),
    ],
)
def test_values_worked_by_hand(form, last, value):
    loss, _ = FORMULAS[form]
    tokens = (gaussian(1, *last.shape)[0].float(), last[None]) if form.startswith("contrastive") else (last[None],)
    assert loss(*tokens).item() == pytest.approx(value)


def test_the_contrastive_term_by_hand():
    # f.l against f.m: 1*2 against 1*4, then 3*4 against 3*2
    first, last = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [4.0]]])
    expected = (math.log1p(math.exp(4 - 2)) + math.log1p(math.exp(6 - 12))) / 2
    assert contrastive_loss(first, last).item() == pytest.approx(expected)
    huge = torch.tensor([[[1e6], [1e6]]]), torch.tensor([[[1e6], [-1e6]]])
    assert contrastive_loss(*huge).item() == pytest.approx(1e12)  # patch 2 points the wrong way by 2e12


@pytest.mark.parametrize(("s", "expected"), [(0.0, LN_3), (1e3, (64 * LN_3 + 132 * LN_2) / 196)])
def test_released_collapse_on_a_14_by_14_grid_depends_on_the_size_of_the_tokens(s, expected):
    """Equal tokens with f . l = s average mean_i ln(2 + e^((r_i - 1) s)), r_i the border's weight.

    That is ln 3 for s = 0 and falls to (64 ln 3 + 132 ln 2) / 196 = 0.826 for large s: 8 x 8 patches lie inside.
    """
    last = torch.ones(1, 196, 1, dtype=torch.float64)
    assert contrastive_loss(s * last, last, "released").item() == pytest.approx(expected, abs=1e-6)


def test_released_is_bounded_by_its_guard():
    first, last = torch.tensor([[[1e3], [1e3]]]), torch.tensor([[[-1.0], [1.0]]])
    found = contrastive_loss(first, last, "released", grid=(1, 2)).item()
    assert found == pytest.approx((-math.log(1e-8) + 0) / 2, rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_diverse_vit_has_a_gradient_for_the_first_layer_by_default(variant):
    first, last = (tokens.requires_grad_() for tokens in gaussian(2, 4, 3))
    gradients = []
    for detach in (None, True, False):
        first.grad = last.grad = None
        loss = contrastive_loss(first, last, variant, detach_first=detach)
        loss.backward()
        assert (first.grad is None) == (variant != "diverse-vit" if detach is None else detach)
        gradients.append((loss.detach(), last.grad))
    torch.testing.assert_close(gradients[1:], [gradients[0]] * 2, rtol=0, atol=0)


def test_patches_that_do_not_fill_the_grid_are_refused():
    first, last = gaussian(2, 6, 3)
    with refused("6 patches form no square", tip="grid="):
        contrastive_loss(first, last, "released")
    with refused("do not fill a grid of 2 x 4"):
        contrastive_loss(first, last, "released", grid=(2, 4))


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_koleo_finds_the_nearest_of_nearly_equal_patches(spread):
    tokens = gaussian(1, 1, 64)[0] + spread * gaussian(1, 40, 64)[1]
    expected = koleo_by_patches([], tokens[0].tolist(), (1, 40))
    assert koleo_loss(tokens.float()).item() == pytest.approx(expected, abs=2e-3)


def test_koleo_takes_zero_tokens_as_dinov2_does():
    """There the neighbour has the largest product, the first of equal ones, and distances get 1e-8."""
    for seed, zeros in ((0, [2]), (1, [0, 3]), (2, [1, 2, 3]), (3, [0, 1, 2, 3, 4, 5])):
        tokens = gaussian(1, 6, 2, seed)[1][0]
        tokens[zeros] = 0
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        nearest = (unit @ unit.T).fill_diagonal_(-2).max(1).indices
        expected = -((unit - unit[nearest]).norm(dim=1) + 1e-8).log().mean().item()
        assert koleo_loss(tokens[None]).item() == pytest.approx(expected, abs=1e-6)


def test_blocks_of_rows_do_not_change_koleo(monkeypatch):
    last = gaussian(2, 9, 4)[1]
    whole = koleo_loss(last)
    monkeypatch.setattr(similarity, "BLOCK_ENTRIES", 2 * 9 * 2)
    assert koleo_loss(last) == whole
