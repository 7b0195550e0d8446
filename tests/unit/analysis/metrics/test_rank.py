import math

import numpy as np
import pytest
import torch

from pdvit.analysis.metrics import METRICS
from pdvit.analysis.metrics.patches import Patches


def ranks(tokens: torch.Tensor) -> tuple[float, float]:
    """Return effective rank and participation ratio of one image `(N, D)`."""
    found = METRICS["rank"](Patches(tokens[None]))
    return found["effective_rank"].item(), found["participation_ratio"].item()


def slow_rank(tokens: np.ndarray) -> float:
    values = np.linalg.svd(tokens.astype(np.float64), compute_uv=False)
    kept = [float(value) for value in values if value > 1e-6 * values.max()]
    return math.exp(-sum(v / sum(kept) * math.log(v / sum(kept)) for v in kept)) if kept else 0.0


def slow_ratio(tokens: np.ndarray) -> float:
    values = np.linalg.eigvalsh(np.cov(tokens.astype(np.float64), rowvar=False).reshape(tokens.shape[1], -1))
    return sum(values) ** 2 / sum(values**2)


@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
@pytest.mark.parametrize(("count", "rank", "width"), [(2, 1, 1), (2, 20, 20), (20, 3, 9), (12, 5, 3), (7, 7, 20)])
def test_equal_the_singular_values_of_numpy(gaussian, count, rank, width, shift):
    for image in gaussian(2, count, rank) @ gaussian(rank, width, seed=1) + shift:
        assert ranks(image) == pytest.approx((slow_rank(image.numpy()), slow_ratio(image.numpy())), rel=1e-5)


def test_worked_by_hand():
    tokens = torch.tensor([[3.0, 0], [0, 1]])  # shares 3/4 and 1/4
    assert ranks(tokens)[0] == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    four = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # two equal eigenvalues
    assert ranks(four)[1] == pytest.approx(2)
    assert ranks(torch.eye(5))[0] == pytest.approx(5)


def test_identical_and_zero_tokens(gaussian):
    for size in (1.0, 1e-20):
        tokens = gaussian(1, 33).expand(17, 33) * size
        assert ranks(tokens) == (pytest.approx(1, abs=1e-12), 0)
    noisy = gaussian(1, 33).expand(17, 33) * (1 + 1e-7 * gaussian(17, 33, seed=1))  # rounding is no direction
    assert ranks(noisy) == (pytest.approx(1, abs=1e-5), 0)
    assert ranks(torch.zeros(3, 4)) == (0, 0)


def test_random_tokens_read_as_the_docs_say(gaussian):
    found = METRICS["rank"](Patches(gaussian(1, 196, 768)))
    assert found["effective_rank"].item() == pytest.approx(189, abs=1)
    assert found["participation_ratio"].item() == pytest.approx(195 * 768 / (196 + 768), rel=0.02)
