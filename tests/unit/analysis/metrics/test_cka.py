import numpy as np
import pytest
import torch
from torch import Tensor

from pdvit.analysis.metrics import cka
from pdvit.analysis.metrics.cka import LinearCKA, centred_gram


def song(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased HSIC as in Song et al. 2012, equation 5, from features `(n, d)`, in float64."""
    n = len(first)
    grams = []
    for features in (first.astype(np.float64), second.astype(np.float64)):
        gram = features @ features.T
        np.fill_diagonal(gram, 0)
        grams.append(gram)
    k, l = grams  # noqa: E741
    ones = np.ones(n)
    total = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * ones @ k @ l @ ones) / (n * (n - 3))


def add_up(batches: list[list[Tensor]]) -> Tensor:
    """CKA between layers whose tokens are given by batch."""
    grams = ([centred_gram(tokens) for tokens in layers] for layers in batches)
    return sum((LinearCKA.of(batch, batch) for batch in grams), LinearCKA()).compute()


@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize(("images", "count"), [(4, 1), (5, 3), (12, 5)])
def test_equals_the_estimator_of_song(gaussian, images, count, shift):
    one = gaussian(images, count, 6, shift=shift)
    two = one[..., :4].tanh() + gaussian(images, count, 4, seed=1)
    a, b = one.flatten(1).numpy(), two.flatten(1).numpy()
    expected = song(a, b) / np.sqrt(song(a, a) * song(b, b))
    matrix = add_up([[one, two]])
    assert matrix[0, 1].item() == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(matrix.diagonal(), 1)


def test_batches_are_averaged_by_their_images(gaussian):
    sizes = (8, 5)
    parts = [(gaussian(n, 3, 4, seed=n), gaussian(n, 2, 6, seed=n) ** 2) for n in sizes]
    flat = [(one.flatten(1).numpy(), two.flatten(1).numpy()) for one, two in parts]

    def total(i: int, j: int) -> float:
        return sum(n * song(pair[i], pair[j]) for n, pair in zip(sizes, flat, strict=True))

    expected = total(0, 1) / np.sqrt(total(0, 0) * total(1, 1))
    assert add_up([list(pair) for pair in parts])[0, 1].item() == pytest.approx(expected, abs=1e-6)


def test_parts_of_the_tokens_change_nothing(gaussian, monkeypatch):
    tokens = gaussian(6, 10, 4)
    whole = centred_gram(tokens)
    monkeypatch.setattr(cka, "BLOCK_ENTRIES", 30)
    torch.testing.assert_close(centred_gram(tokens), whole)


@pytest.mark.parametrize("images", [4, 5, 30])
def test_never_nan_and_never_beyond_one(gaussian, images):
    layers = [gaussian(images, 2, 3), torch.zeros(images, 2, 3), torch.full((images, 4, 2), 0.1)]
    layers += [1e-15 * gaussian(images, 1, 2)]
    layers += [gaussian(1, 7, 3, seed=1).expand(images, 7, 3) * (1 + 1e-7 * gaussian(images, 7, 3))]
    matrix = add_up([layers])
    assert matrix.isfinite().all()
    assert float(matrix.abs().max()) <= 1
    assert matrix[1].tolist() == matrix[2].tolist() == matrix[4].tolist() == [0] * 5  # the same for every image
    assert matrix[3, 3].item() == pytest.approx(1)
