import math
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdvit import similarity
from pdvit.errors import UserError
from pdvit.similarity import patch_similarity

SIGNED = pytest.mark.parametrize("signed", [False, True], ids=["absolute", "signed"])


def gaussian(images: int, count: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(images, count, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def literal(tokens: Tensor, signed: bool) -> list[float]:
    """P as the paper writes it, one pair at a time."""
    found = []
    for image in tokens.tolist():
        total = 0.0
        for a, b in permutations(image, 2):
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            total += cosine if signed else abs(cosine)
        found.append(total / (len(image) * (len(image) - 1)))
    return found


def value_and_gradient(tokens: Tensor, signed: bool = False) -> tuple[Tensor, Tensor]:
    tokens = tokens.detach().clone().requires_grad_()
    value = patch_similarity(tokens, signed)
    weights = torch.arange(1, len(value) + 1).to(value)  # another weight for every image
    (value * weights).sum().backward()
    assert tokens.grad is not None
    return value.detach(), tokens.grad


class Largest(TorchDispatchMode):
    """Remembers how many entries the largest tensor had."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@SIGNED
@pytest.mark.parametrize("shape", [(3, 2, 1), (2, 9, 5), (1, 4, 7), (2, 11, 2)], ids=str)
def test_equals_the_formula_pair_by_pair_whatever_the_lengths(signed, shape):
    tokens = gaussian(*shape)
    lengths = gaussian(*shape[:2], 1, seed=1).abs() + 0.1
    expected = pytest.approx(literal(tokens, signed), abs=1e-12)
    assert patch_similarity(lengths * tokens, signed).tolist() == expected


def test_values_worked_by_hand():
    # cosines: (1,0).(-1,0) = -1, (1,0).(1,1) = 1/sqrt 2, (-1,0).(1,1) = -1/sqrt 2; lengths don't matter
    tokens = torch.tensor([[[1.0, 0.0], [-3.0, 0.0], [5.0, 5.0]]])
    assert patch_similarity(tokens).item() == pytest.approx((1 + math.sqrt(2)) / 3)
    assert patch_similarity(tokens, signed=True).item() == pytest.approx(-1 / 3)
    assert patch_similarity(torch.eye(6)[None] * 7).item() == 0
    assert patch_similarity(torch.zeros(1, 5, 4)).item() == 0
    assert patch_similarity(torch.ones(0, 4, 3)).shape == (0,)
    simplex = torch.eye(5, dtype=torch.float64) - 1 / 5
    assert patch_similarity(simplex[None], signed=True).item() == pytest.approx(-1 / 4)  # the least
    # Welch: the mean of cos^2 over pairs is at least (n - d) / (d (n - 1)), and |cos| >= cos^2: here n = 24, d = 6.
    tight = torch.eye(6, dtype=torch.float64).repeat(4, 1)[None]
    assert patch_similarity(tight).item() == pytest.approx((24 - 6) / (6 * 23))
    assert patch_similarity(tight).dtype == torch.float64


@pytest.mark.parametrize(("width", "expected"), [(192, 0.0576), (384, 0.0407), (768, 0.0288), (1024, 0.0249)])
def test_random_tokens_give_the_known_value(width, expected):
    found = patch_similarity(gaussian(4, 196, width, dtype=torch.float32))
    assert expected == pytest.approx(math.sqrt(2 / (math.pi * width)), abs=5e-5)
    assert found.tolist() == pytest.approx([expected] * 4, rel=0.02)
    assert patch_similarity(gaussian(4, 196, width), signed=True).abs().max() < 0.1 * expected


LARGE_AND_SMALL = [(torch.float32, 1e20), (torch.float32, 1e37), (torch.bfloat16, 1e30), (torch.float32, 1e-11)]
LARGE_AND_SMALL += [(torch.float16, 2e4), (torch.float16, 1e-5), (torch.float16, 1e-6)]


@SIGNED
@pytest.mark.parametrize(("dtype", "size"), LARGE_AND_SMALL, ids=str)
def test_the_size_of_tokens_does_not_matter(signed, dtype, size):
    """A square of such a size is infinite or 0 in float32; float16 has only a few digits left."""
    tokens = (gaussian(2, 9, 7).clamp(-3, 3) * size).to(dtype)
    value, gradient = value_and_gradient(tokens, signed)
    assert value.tolist() == pytest.approx(literal(tokens.double(), signed), abs=1e-6)
    assert gradient.isfinite().all()
    assert patch_similarity(tokens[:, :1].expand(-1, 64, -1), signed).tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("entries", [1, 50, 64, 100, 200])
def test_blocks_change_neither_value_nor_gradient(monkeypatch, entries):
    tokens = gaussian(2, 11, 5)
    value, gradient = value_and_gradient(tokens)
    monkeypatch.setattr(similarity, "BLOCK_ENTRIES", entries)
    found, pull = value_and_gradient(tokens)
    assert found.tolist() == pytest.approx(literal(tokens, signed=False), abs=1e-12)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(pull, gradient)


def test_no_tensor_is_larger_than_a_block_or_the_tokens(monkeypatch):
    tokens = gaussian(1, 400, 8)
    with Largest() as whole:
        value_and_gradient(tokens)
    assert whole.entries == 400 * 400  # what blocks avoid
    monkeypatch.setattr(similarity, "BLOCK_ENTRIES", 4000)
    with Largest() as blockwise:
        value_and_gradient(tokens)
    assert blockwise.entries <= 4000


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 4, 4)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match="three axes"):
        patch_similarity(torch.zeros(shape))
