import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from pdvit import similarity
from pdvit.analysis.metrics import METRICS
from pdvit.analysis.metrics.patches import Patches
from pdvit.similarity import unit_tokens


def measure(tokens: Tensor, first: Tensor) -> list[list[float]]:
    found = METRICS["drift"](Patches(tokens, first=unit_tokens(first)))
    return [found[name].tolist() for name in ("drift_cosine", "drift_retrieval")]


def slow(tokens: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    """Cosine with the own patch, and the fraction that finds it, patch by patch."""
    own, found = [], []
    for index, token in enumerate(tokens.astype(np.float64)):
        cosines = cosine_similarity(token[None], first.astype(np.float64))[0]
        own.append(cosines[index])
        nearest = np.flatnonzero(cosines >= cosines.max() - 1e-6)
        found.append(1 / len(nearest) if index in nearest else 0)
    return np.mean(own), np.mean(found)


@pytest.mark.parametrize(("count", "width", "noise"), [(2, 3, 1.0), (9, 4, 0.7), (25, 16, 2.0), (30, 8, 5.0)])
def test_equals_a_search_patch_by_patch_in_blocks_of_any_size(gaussian, monkeypatch, count, width, noise):
    first = gaussian(4, count, width)
    tokens = first + noise * gaussian(4, count, width, seed=1)
    expected = np.array([slow(a, b) for a, b in zip(tokens.numpy(), first.numpy(), strict=True)])
    for entries in (10**6, 60):
        monkeypatch.setattr(similarity, "BLOCK_ENTRIES", entries)
        np.testing.assert_allclose(measure(tokens, first), expected.T, atol=1e-6)


def test_the_first_layer_itself_its_mirror_and_identical_or_zero_tokens(gaussian):
    tokens = gaussian(2, 12, 8)
    assert measure(tokens, tokens) == [pytest.approx([1, 1]), [1, 1]]
    assert measure(-tokens, tokens) == [pytest.approx([-1, -1]), [0, 0]]
    same, zero = torch.full((1, 8, 3), 0.3), torch.zeros(1, 8, 3)  # found by chance
    assert measure(same, same) == [pytest.approx([1]), pytest.approx([1 / 8])]
    assert measure(zero, zero) == [[0], pytest.approx([1 / 8])]
