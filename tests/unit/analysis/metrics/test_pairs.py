from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from pdvit.analysis.metrics import METRICS, Patches, pairs
from pdvit.analysis.metrics.pairs import PERCENTILES, histogram, percentiles
from pdvit.similarity import unit_tokens

few = settings(max_examples=40, deadline=None)


def all_pairs(tokens: np.ndarray) -> np.ndarray:
    """The cosines of all pairs of the tokens of one image, in float64."""
    cosines = cosine_similarity(tokens.astype(np.float64))
    return np.array([cosines[i, j] for i in range(len(tokens)) for j in range(i + 1, len(tokens))]).clip(-1, 1)


@few
@given(
    count=st.integers(2, 12),
    width=st.integers(1, 9),
    images=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([1, 3, 1000]),  # few levels: many ties
    block=st.sampled_from([1, 40, 10**6]),
)
def test_percentiles_are_those_of_numpy(count, width, images, seed, levels, block):
    rng = np.random.default_rng(seed)
    tokens = (rng.integers(-levels, levels + 1, (images, count, width)) / levels).astype(np.float32)
    with mock.patch.object(pairs, "BLOCK_ENTRIES", block):
        found = percentiles(unit_tokens(torch.from_numpy(tokens)))
    expected = [np.percentile(all_pairs(image), PERCENTILES) for image in tokens]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_many_tokens_are_exact_without_their_pairs(gaussian):
    unit = unit_tokens(gaussian(1, 2100, 3, shift=0.5))  # more pairs than a block
    cosines = (unit[0].double() @ unit[0].T.double()).numpy()[np.triu_indices(2100, 1)]
    np.testing.assert_allclose(percentiles(unit)[0], np.percentile(cosines, PERCENTILES), atol=1e-6)


@pytest.mark.parametrize("entries", [1, 40, 300])
def test_blocks_of_any_size_agree(gaussian, monkeypatch, entries):
    unit = unit_tokens(gaussian(3, 17, 5))
    whole, bars = percentiles(unit), histogram(unit)
    monkeypatch.setattr(pairs, "BLOCK_ENTRIES", entries)
    torch.testing.assert_close(percentiles(unit), whole, atol=1e-6, rtol=0)
    assert torch.equal(histogram(unit), bars)


def test_the_histogram_is_that_of_numpy(gaussian):
    tokens = gaussian(2, 30, 8, shift=0.3)
    expected = [np.histogram(all_pairs(image.numpy()), bins=100, range=(-1, 1))[0] / (30 * 29 / 2) for image in tokens]
    np.testing.assert_allclose(histogram(unit_tokens(tokens)), expected, atol=1e-12)


def test_identical_opposite_and_zero_tokens():
    same = torch.full((1, 5, 3), 0.7)
    assert percentiles(unit_tokens(same)) == pytest.approx(np.ones((1, 5)), abs=1e-6)
    assert histogram(unit_tokens(same))[0, -1] == 1
    opposite = torch.tensor([[[1.0, 0], [-1, 0]]])
    assert percentiles(unit_tokens(opposite)).tolist() == [[-1] * 5]
    assert percentiles(torch.zeros(1, 4, 3)).tolist() == [[0] * 5]


def test_random_tokens_give_the_normal_percentiles(gaussian):
    found = percentiles(unit_tokens(gaussian(4, 100, 400))).mean(0)
    np.testing.assert_allclose(found, np.array([-1.645, -0.674, 0, 0.674, 1.645]) / 20, atol=0.003)


def test_the_group_gives_each_column_and_curve(gaussian):
    found = METRICS["pairs"].of(Patches(gaussian(2, 6, 4)))
    assert set(found) == {*METRICS["pairs"].columns, *METRICS["pairs"].curves}
    np.testing.assert_allclose(found["edges"][0], np.linspace(-1, 1, 101), atol=1e-15)
