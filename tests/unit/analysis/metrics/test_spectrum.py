import math

import numpy as np
import pytest
import torch

from pdvit.analysis.metrics.patches import Patches, grid_of
from pdvit.analysis.metrics.spectrum import spectrum_metrics
from pdvit.errors import UserError


def slow(image: np.ndarray, rows: int, columns: int) -> tuple[float, float, list[float]]:
    """Both fractions and the curve of one image `(N, D)`, frequency by frequency."""
    found = np.fft.fft2(image.astype(np.float64).reshape(rows, columns, -1), axes=(0, 1))
    power, high = (abs(found) ** 2).sum(-1), 0.0
    for u, v in np.ndindex(rows, columns):  # a frequency and its mirror image are the same wave
        if max(min(u, rows - u) / rows, min(v, columns - v) / columns) >= 0.25:
            high += power[u, v]
    floor = 1e-6 * abs(found).max((0, 1))
    logs = np.log(np.maximum(abs(found), floor)).mean(-1)
    least = min(rows, columns)
    along = [logs[round(k * rows / least), round(k * columns / least)] - logs[0, 0] for k in range(least // 2 + 1)]
    return power[0, 0] / power.sum(), high / power.sum(), along


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (3, 6), (4, 2), (1, 2), (7, 7), (2, 7), (7, 2)])
def test_equals_a_sum_over_the_frequencies_of_numpy(gaussian, grid):
    tokens = gaussian(2, grid[0] * grid[1], 5, shift=0.5)
    found = spectrum_metrics(Patches(tokens, grid))
    for index, image in enumerate(tokens.numpy()):
        constant, high, curve = slow(image, *grid)
        assert found["dc_share"][index].item() == pytest.approx(constant, abs=1e-6)
        assert found["high_frequency_share"][index].item() == pytest.approx(high, abs=1e-6)
        np.testing.assert_allclose(found["by_frequency"][index], curve, atol=1e-5)


def test_identical_and_zero_tokens(gaussian):
    same = gaussian(1, 1, 9).expand(1, 16, 9)
    found = spectrum_metrics(Patches(same, (4, 4)))
    assert (found["dc_share"].item(), found["high_frequency_share"].item()) == pytest.approx((1, 0), abs=1e-6)
    np.testing.assert_allclose(found["by_frequency"], [[0, *[math.log(1e-6)] * 2]], rtol=1e-4)
    found = spectrum_metrics(Patches(torch.zeros(1, 16, 9), (4, 4)))
    assert (found["dc_share"].item(), found["high_frequency_share"].item()) == (1, 0)
    assert found["by_frequency"].tolist() == [[0, 0, 0]]


def test_random_tokens_read_as_the_docs_say(gaussian):
    tokens = gaussian(16, 196, 192)
    found = spectrum_metrics(Patches(tokens, (14, 14)))
    assert float(found["dc_share"].mean()) == pytest.approx(1 / 196, rel=0.1)
    assert float(found["high_frequency_share"].mean()) == pytest.approx(0.75, abs=0.01)
    curve = found["by_frequency"].mean(0)
    assert float(curve[3]) == pytest.approx(0.35, abs=0.06)
    assert float(curve[-1]) == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize(
    ("count", "image", "grid"),
    [(196, (224, 224), (14, 14)), (128, (128, 256), (8, 16)), (2, (16, 32), (1, 2)), (49, (225, 224), (7, 7))],
)
def test_a_grid_has_the_shape_of_the_image(count, image, grid):
    assert grid_of(count, image) == grid
    with pytest.raises(UserError, match="no grid"):
        grid_of(197, (224, 224))
