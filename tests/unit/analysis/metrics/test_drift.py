import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from pdvit.analysis.metrics import drift
from pdvit.analysis.metrics.drift import own_cosine, retrieval
from pdvit.similarity import unit_tokens


def slow(tokens: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    """Cosine with the own patch, and the share that finds it, patch by patch."""
    own, found = [], []
    for index, token in enumerate(tokens.astype(np.float64)):
        cosines = cosine_similarity(token[None], first.astype(np.float64))[0]
        own.append(cosines[index])
        nearest = np.flatnonzero(cosines >= cosines.max() - 1e-6)
        found.append(1 / len(nearest) if index in nearest else 0)
    return np.mean(own), np.mean(found)


@pytest.mark.parametrize(("count", "width", "noise"), [(2, 3, 1.0), (9, 4, 0.7), (25, 16, 2.0), (30, 8, 5.0)])
def test_equals_a_search_patch_by_patch(gaussian, count, width, noise):
    first = gaussian(4, count, width)
    tokens = first + noise * gaussian(4, count, width, seed=1)
    unit, start = unit_tokens(tokens), unit_tokens(first)
    expected = np.array([slow(a, b) for a, b in zip(tokens.numpy(), first.numpy(), strict=True)])
    np.testing.assert_allclose(own_cosine(unit, start), expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(retrieval(unit, start), expected[:, 1], atol=1e-6)


def test_blocks_of_rows_change_nothing(gaussian, monkeypatch):
    unit, start = unit_tokens(gaussian(2, 13, 4)), unit_tokens(gaussian(2, 13, 4, seed=1))
    whole = retrieval(unit, start)
    monkeypatch.setattr(drift, "BLOCK_ENTRIES", 60)
    torch.testing.assert_close(retrieval(unit, start), whole)


def test_the_first_layer_itself_is_found_and_its_mirror_is_not(gaussian):
    unit = unit_tokens(gaussian(2, 12, 8))
    assert retrieval(unit, unit).tolist() == [1, 1]
    assert own_cosine(unit, unit).tolist() == pytest.approx([1, 1])
    assert own_cosine(-unit, unit).tolist() == pytest.approx([-1, -1])
    assert retrieval(-unit, unit).tolist() == [0, 0]


def test_identical_and_zero_tokens_find_themselves_by_chance():
    same = unit_tokens(torch.full((1, 8, 3), 0.3))
    assert retrieval(same, same).tolist() == pytest.approx([1 / 8])
    zero = torch.zeros(1, 8, 3)
    assert retrieval(zero, zero).tolist() == pytest.approx([1 / 8])
    assert own_cosine(zero, zero).tolist() == [0]
