import statistics

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from pdvit import similarity
from pdvit.analysis.metrics import METRICS
from pdvit.analysis.metrics.patches import Patches
from pdvit.analysis.metrics.similarity import PERCENTILES, outliers
from pdvit.definitions import GROUPS
from pdvit.similarity import unit_tokens


def slow_norms(tokens: np.ndarray) -> dict[str, float]:
    """One image, token by token, with Python's own statistics."""
    lengths = [float(np.sqrt(sum(float(x) ** 2 for x in token))) for token in tokens]
    median = statistics.median(lengths)
    deviation = statistics.median(abs(length - median) for length in lengths)
    kept = [t for t, n in zip(tokens, lengths, strict=True) if n <= median + max(median, 5 * 1.4826 * deviation)]
    cosines = abs(cosine_similarity(kept))[~np.eye(len(kept), dtype=bool)]
    return {
        "norm_mean": statistics.mean(lengths),
        "norm_std": statistics.stdev(lengths),
        "norm_peak": max(max(lengths), 1e-12) / max(median, 1e-12),
        "norm_outliers": 1 - len(kept) / len(tokens),
        "similarity_without_outliers": cosines.mean(),
    }


def check_norms(tokens: torch.Tensor) -> None:
    found = METRICS["norms"](Patches(tokens))
    assert set(found) == set(GROUPS["norms"]["columns"])
    expected = [slow_norms(image.double().numpy()) for image in tokens]
    for name, values in found.items():
        np.testing.assert_allclose(values, [image[name] for image in expected], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("count", "large", "factor"), [(2, 1, 1.5), (5, 2, 100.0), (9, 3, 4.0), (14, 6, 100.0)])
def test_norms_equal_a_slow_count(gaussian, count, large, factor):
    for width in (1, 4):
        tokens = gaussian(3, count, width, seed=count, shift=2)
        tokens[:2, :large] *= factor
        check_norms(tokens)


def test_norms_of_identical_zero_and_two_tokens(gaussian):
    check_norms(torch.full((1, 6, 4), 1.3))
    check_norms(torch.zeros(1, 5, 3))
    check_norms(gaussian(2, 2, 5))
    pair = torch.tensor([[[1.0, 0], [1000, 0]]])  # of two, neither is an outlier
    assert METRICS["norms"](Patches(pair))["norm_outliers"].tolist() == [0]


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_outliers_do_not_depend_on_scale_or_rounding(gaussian, size):
    tokens = gaussian(1, 20, 8)
    tokens[0, 3] *= 20
    found = outliers(torch.linalg.vector_norm(tokens * size, dim=-1))
    assert found[0].nonzero().flatten().tolist() == [3]
    equal = torch.full((1, 50), 27.7)
    equal[0, 0] += 1e-4
    assert not outliers(size * equal).any()
    assert int(outliers(torch.cat([torch.zeros(1, 7), torch.rand(1, 6) + 1], 1)).sum()) == 6  # never more than half


def drift(tokens: torch.Tensor, first: torch.Tensor) -> list[list[float]]:
    found = METRICS["drift"](Patches(tokens, first=unit_tokens(first)))
    return [found[name].tolist() for name in ("drift_cosine", "drift_retrieval")]


def slow_drift(tokens: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    """Cosine with the own patch, and the fraction that finds it, patch by patch."""
    own, found = [], []
    for index, token in enumerate(tokens.astype(np.float64)):
        cosines = cosine_similarity(token[None], first.astype(np.float64))[0]
        own.append(cosines[index])
        nearest = np.flatnonzero(cosines >= cosines.max() - 1e-6)
        found.append(1 / len(nearest) if index in nearest else 0)
    return np.mean(own), np.mean(found)


@pytest.mark.parametrize(("count", "width", "noise"), [(2, 3, 1.0), (9, 4, 0.7), (25, 16, 2.0), (30, 8, 5.0)])
def test_drift_equals_a_search_patch_by_patch_in_blocks_of_any_size(gaussian, monkeypatch, count, width, noise):
    first = gaussian(4, count, width)
    tokens = first + noise * gaussian(4, count, width, seed=1)
    expected = np.array([slow_drift(a, b) for a, b in zip(tokens.numpy(), first.numpy(), strict=True)])
    for entries in (10**6, 60):
        monkeypatch.setattr(similarity, "BLOCK_ENTRIES", entries)
        np.testing.assert_allclose(drift(tokens, first), expected.T, atol=1e-6)


def test_drift_of_the_first_layer_itself_its_mirror_and_identical_or_zero_tokens(gaussian):
    tokens = gaussian(2, 12, 8)
    assert drift(tokens, tokens) == [pytest.approx([1, 1]), [1, 1]]
    assert drift(-tokens, tokens) == [pytest.approx([-1, -1]), [0, 0]]
    same, zero = torch.full((1, 8, 3), 0.3), torch.zeros(1, 8, 3)  # found by chance
    assert drift(same, same) == [pytest.approx([1]), pytest.approx([1 / 8])]
    assert drift(zero, zero) == [[0], pytest.approx([1 / 8])]


def pairs(tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentiles `(B, 5)` and the histogram `(B, 100)` of the pairs of each image."""
    found = METRICS["pairs"](Patches(tokens))
    return np.stack([found[f"pairs_p{at:02}"] for at in PERCENTILES], 1), found["histogram"].numpy()


def all_pairs(tokens: np.ndarray) -> np.ndarray:
    """The cosines of all pairs of the tokens of one image, in float64."""
    cosines = cosine_similarity(tokens.astype(np.float64))
    return np.array([cosines[i, j] for i in range(len(tokens)) for j in range(i + 1, len(tokens))]).clip(-1, 1)


@pytest.mark.parametrize("levels", [1, 3, 1000])  # few levels: many ties
@pytest.mark.parametrize(("images", "count", "width"), [(1, 2, 1), (3, 7, 2), (4, 12, 9)])
def test_percentiles_are_those_of_numpy(images, count, width, levels):
    tokens = (np.random.default_rng(0).integers(-levels, levels + 1, (images, count, width)) / levels).astype("float32")
    expected = [np.percentile(all_pairs(image), PERCENTILES) for image in tokens]
    np.testing.assert_allclose(pairs(torch.from_numpy(tokens))[0], expected, atol=1e-6)


def test_percentiles_of_many_tokens_come_from_a_sample(gaussian):
    tokens = gaussian(1, 2100, 3, shift=0.5)
    cosines = cosine_similarity(tokens[0].double())[np.triu_indices(2100, 1)]
    found, bars = pairs(tokens)
    # standard error of the fraction: sqrt(0.25 / 2^20) = 0.0005
    assert (cosines[:, None] <= found[0]).mean(0) == pytest.approx(np.array(PERCENTILES) / 100, abs=0.0025)
    np.testing.assert_array_equal(found, pairs(tokens)[0])
    exact = np.histogram(cosines, 100, (-1, 1))[0] / len(cosines)
    np.testing.assert_allclose(bars[0], exact, atol=1e-5)  # all pairs; some are within rounding of an edge


def test_the_histogram_is_that_of_numpy_in_blocks_of_any_size(gaussian, monkeypatch):
    tokens = gaussian(2, 30, 8, shift=0.3)
    expected = [np.histogram(all_pairs(image.numpy()), bins=100, range=(-1, 1))[0] / (30 * 29 / 2) for image in tokens]
    for entries in (10**6, 300, 1):
        monkeypatch.setattr(similarity, "BLOCK_ENTRIES", entries)
        np.testing.assert_allclose(pairs(tokens)[1], expected, atol=1e-12)


def test_pairs_of_identical_opposite_and_zero_tokens():
    same = torch.full((1, 5, 3), 0.7)
    assert pairs(same)[0] == pytest.approx(np.ones((1, 5)), abs=1e-6)
    assert pairs(same)[1][0, -1] == 1
    opposite = torch.tensor([[[1.0, 0], [-1, 0]]])
    assert pairs(opposite)[0].tolist() == [[-1] * 5]
    assert pairs(torch.zeros(1, 4, 3))[0].tolist() == [[0] * 5]


def test_random_tokens_read_as_the_docs_say(gaussian):
    found = pairs(gaussian(4, 100, 400))[0].mean(0)
    np.testing.assert_allclose(found, np.array([-1.645, -0.674, 0, 0.674, 1.645]) / 20, atol=0.003)
    norms = METRICS["norms"](Patches(gaussian(8, 196, 768)))
    assert float(norms["norm_mean"].mean()) == pytest.approx(768**0.5, rel=0.01)
    assert float(norms["norm_std"].mean()) == pytest.approx(0.5**0.5, rel=0.05)
    assert float(norms["norm_peak"].max()) < 1.1
    assert float(norms["norm_outliers"].max()) == 0


@pytest.mark.parametrize("size", [1e-11, 1e20, 1e36])
def test_no_metric_depends_on_the_size_of_the_tokens_but_lengths(gaussian, size):
    tokens = gaussian(2, 16, 8, shift=0.5)
    for group in ("similarity", "similarity_signed", "norms", "pairs", "rank", "spectrum"):
        found, expected = (METRICS[group](Patches(each, (4, 4))) for each in (tokens * size, tokens))
        for name in found.keys() - {"norm_mean", "norm_std"}:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
