import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdvit.analysis.metrics import METRICS, Patches
from pdvit.analysis.metrics.norms import outliers, similarity_without

few = settings(max_examples=60, deadline=None)


def slow(tokens: np.ndarray) -> dict[str, float]:
    """One image, token by token, with Python's own statistics."""
    lengths = [float(np.sqrt(sum(float(x) ** 2 for x in token))) for token in tokens]
    median = statistics.median(lengths)
    deviation = statistics.median(abs(length - median) for length in lengths)
    kept = [t for t, n in zip(tokens, lengths, strict=True) if n <= median + max(median, 5 * 1.4826 * deviation)]
    cosines = [
        abs(float(np.dot(a, b)) / (np.linalg.norm(a) * np.linalg.norm(b))) if a.any() and b.any() else 0.0
        for i, a in enumerate(kept)
        for j, b in enumerate(kept)
        if i != j
    ]
    return {
        "norm_mean": statistics.mean(lengths),
        "norm_std": statistics.stdev(lengths),
        "norm_peak": max(max(lengths), 1e-12) / max(median, 1e-12),
        "norm_outliers": 1 - len(kept) / len(tokens),
        "similarity_without_outliers": statistics.mean(cosines),
    }


def check(tokens: torch.Tensor) -> None:
    found = METRICS["norms"].of(Patches(tokens))
    assert set(found) == set(METRICS["norms"].columns)
    expected = [slow(image.double().numpy()) for image in tokens]
    for name, values in found.items():
        np.testing.assert_allclose(values, [image[name] for image in expected], rtol=1e-5, atol=1e-5, err_msg=name)


@few
@given(
    count=st.integers(2, 14),
    width=st.integers(1, 6),
    large=st.integers(0, 6),
    factor=st.sampled_from([1.5, 4.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_a_slow_count(count, width, large, factor, seed):
    tokens = torch.randn(3, count, width, generator=torch.Generator().manual_seed(seed)) + 2
    tokens[:2, : min(large, count)] *= factor
    check(tokens)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_size_does_not_matter_to_what_stands_out(gaussian, size):
    tokens = gaussian(1, 20, 8)
    tokens[0, 3] *= 20
    found = outliers(torch.linalg.vector_norm(tokens * size, dim=-1))
    assert found[0].nonzero().flatten().tolist() == [3]


def test_identical_zero_and_two_tokens(gaussian):
    check(torch.full((1, 6, 4), 1.3))
    check(torch.zeros(1, 5, 3))
    check(gaussian(2, 2, 5))
    pair = torch.tensor([[[1.0, 0], [1000, 0]]])  # of two, neither stands out
    assert METRICS["norms"].of(Patches(pair))["norm_outliers"].tolist() == [0]


def test_rounding_sets_nobody_apart():
    lengths = torch.full((1, 50), 27.7)
    lengths[0, 0] += 1e-4
    assert not outliers(lengths).any()


def test_more_than_half_can_never_be_left_out():
    lengths = torch.cat([torch.zeros(1, 7), torch.rand(1, 6) + 1], 1)
    assert int(outliers(lengths).sum()) == 6


def test_p_without_is_that_of_the_others(gaussian):
    from pdvit import patch_similarity

    tokens = gaussian(2, 9, 4)
    left_out = torch.zeros(2, 9, dtype=torch.bool)
    left_out[:, [2, 5]] = True
    kept = tokens[:, [0, 1, 3, 4, 6, 7, 8]]
    torch.testing.assert_close(similarity_without(tokens, left_out), patch_similarity(kept))


def test_random_tokens_read_as_the_docs_say(gaussian):
    found = METRICS["norms"].of(Patches(gaussian(8, 196, 768)))
    assert float(found["norm_mean"].mean()) == pytest.approx(768**0.5, rel=0.01)
    assert float(found["norm_std"].mean()) == pytest.approx(0.5**0.5, rel=0.05)
    assert float(found["norm_peak"].max()) < 1.1
    assert float(found["norm_outliers"].max()) == 0
