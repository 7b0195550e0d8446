import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from pdvit.analysis import METRICS, measure
from pdvit.analysis.metrics import Patches
from pdvit.analysis.metrics.norms import outliers, similarity_without
from pdvit.analysis.metrics.pairs import PERCENTILES, percentiles
from pdvit.analysis.metrics.sample import PER_PATCH, cosines_of, draw_pairs
from pdvit.similarity import patch_similarity, unit_tokens

TRIALS = 300


def sampled(tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """Every metric of pairs from one sample."""
    patches = Patches(tokens, pairs=draw_pairs(tokens.shape[1], seed=seed))
    return {key: value for name in ("similarity", "norms", "pairs") for key, value in METRICS[name].of(patches).items()}


@pytest.fixture(scope="module")
def clustered() -> Tensor:
    """Tokens whose cosines are far from normal: a common direction, of a few tokens much more, which are longer."""
    random = torch.Generator().manual_seed(4)
    tokens = torch.randn(1, 150, 12, generator=random)
    tokens[..., 0] += torch.linspace(0, 3, 150)
    tokens[:, :12] *= 20
    return tokens


def test_there_are_as_many_pairs_for_each_patch_and_none_with_itself():
    pairs = draw_pairs(400)
    assert pairs is not None
    assert pairs.shape == (2, 400 * PER_PATCH)
    assert bool((pairs[0] != pairs[1]).all())
    assert pairs.min() == 0
    assert pairs.max() == 399
    assert torch.equal(pairs, draw_pairs(400))
    # a chi-squared of 399 degrees has a standard deviation of 28
    counts = pairs.flatten().bincount(minlength=400).double()
    assert float(((counts - 64).square() / 64).sum()) == pytest.approx(399, abs=170)


@pytest.mark.parametrize(("count", "drawn"), [(2, False), (65, False), (66, True)])
def test_maps_with_no_more_pairs_than_a_sample_are_measured_whole(count, drawn):
    assert (draw_pairs(count) is not None) == drawn


def test_cosines_are_those_of_the_pairs(clustered):
    pairs = draw_pairs(150)
    unit = unit_tokens(clustered.repeat(3, 1, 1) + torch.arange(3)[:, None, None])
    whole = unit @ unit.transpose(1, 2)
    torch.testing.assert_close(cosines_of(unit, pairs), whole[:, pairs[0], pairs[1]])


def test_the_sample_is_right_on_average_and_its_error_is_the_spread_over_samples(clustered):
    left_out = outliers(torch.linalg.vector_norm(clustered, dim=-1))
    assert int(left_out.sum()) == 12
    exact = {
        "similarity": float(patch_similarity(clustered)),
        "similarity_without_outliers": float(similarity_without(clustered, left_out)),
    }
    whole = percentiles(unit_tokens(clustered))[0].tolist()
    exact |= {f"pairs_p{at:02}": value for at, value in zip(PERCENTILES, whole, strict=True)}
    found = [sampled(clustered, seed) for seed in range(TRIALS)]
    for name, value in exact.items():
        values = np.array([float(trial[name]) for trial in found])
        errors = np.array([float(trial[f"error/{name}"]) for trial in found])
        spread = values.std(ddof=1)
        assert values.mean() == pytest.approx(value, abs=4 * spread / TRIALS**0.5), name
        # the spread of 300 values is known to 4 %; 5 standard errors, and what a quantile's own error adds
        assert errors.mean() == pytest.approx(spread, rel=0.2), name
        assert np.abs(values - value).max() < 5 * errors.mean(), name


def test_a_model_with_a_large_map_says_the_error():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=4, embed_dim=16, depth=2, num_heads=1)
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    metrics = ["similarity", "similarity_signed", "norms", "pairs"]
    whole, some = measure(model, images, metrics), measure(model, images, metrics, pairs="sampled")
    assert not whole.sampling
    exact = whole.table.set_index(["metric", "layer"])["mean"]
    rough = some.table.set_index(["metric", "layer"])["mean"]
    layers = ["embed", "block 1", "block 2", "norm"]
    assert set(some.sampling) == {
        "similarity",
        "similarity_without_outliers",
        *(f"pairs_p{at:02}" for at in PERCENTILES),
    }
    for name, errors in some.sampling.items():
        assert list(errors) == layers
        for layer, error in errors.items():
            assert 0 < error < 0.02
            assert abs(rough[name, layer] - exact[name, layer]) < 4 * error
    for name in ("similarity_signed", "norm_mean"):  # what is linear in the patches anyway stays exact
        assert rough[name].tolist() == exact[name].tolist()
    assert f"{max(some.sampling['similarity'].values()):.2g}" in some.notes[-1]


def test_a_small_map_is_measured_whole_and_that_is_said():
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
    model = timm.create_model("vit_tiny_patch16_224", **small)
    found = measure(model, torch.ones(1, 3, 32, 32), "similarity,pairs", pairs="sampled")
    assert found.sampling == {}
    assert "all were measured" in found.notes[-1]
