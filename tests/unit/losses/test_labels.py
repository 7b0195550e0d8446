import math

import pytest
import torch
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses.labels import label_entropy, label_loss, soft_labels

CLASSES = 4


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["images", "patches"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_indices_and_shares_equal_the_formula(shape, smoothing):
    logits, labels = gaussian(*shape), torch.arange(6).reshape(shape) % CLASSES
    soft = (1 - smoothing) * F.one_hot(labels, CLASSES).double() + smoothing / CLASSES
    expected = -(soft * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(label_loss(logits, labels, smoothing), expected)
    torch.testing.assert_close(label_loss(logits, F.one_hot(labels, CLASSES).double(), smoothing), expected)
    torch.testing.assert_close(soft_labels(labels, logits, smoothing, multi_label=False), soft)


def test_multi_hot_whole_numbers_are_shares():
    logits, several = gaussian(2), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])
    expected = F.binary_cross_entropy_with_logits(logits, several.double())
    torch.testing.assert_close(label_loss(logits, several, multi_label=True), expected)


def test_shares_of_another_precision_are_taken():
    logits, soft = gaussian(3).float(), gaussian(3).softmax(-1)
    torch.testing.assert_close(label_loss(logits, soft), label_loss(logits, soft.float()))
    torch.testing.assert_close(label_loss(logits, soft, multi_label=True), label_loss(logits, soft.float(), 0.0, True))


@pytest.mark.parametrize(
    ("soft", "multi_label", "entropy"),
    [
        ([[0.0, 1.0, 0.0, 0.0]], False, 0),
        ([[0.25, 0.25, 0.25, 0.25]], False, math.log(4)),
        ([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], False, math.log(2) / 2),
        ([[1.0, 1.0, 0.0, 0.0]], True, 0),
        ([[0.5, 1.0, 0.0, 0.5]], True, math.log(2) / 2),
    ],
)
def test_entropy_worked_by_hand(soft, multi_label, entropy):
    assert label_entropy(torch.tensor(soft), multi_label).item() == pytest.approx(entropy)


@pytest.mark.parametrize("edge", [-1, CLASSES])
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["images", "patches"])
def test_an_index_out_of_range_is_refused_with_the_range(shape, edge):
    labels = torch.zeros(shape, dtype=torch.long)
    labels[-1] = edge
    with pytest.raises(UserError, match=f"{edge}") as caught:
        label_loss(gaussian(*shape), labels)
    assert "from 0 to 3" in caught.value.tip


@pytest.mark.parametrize("device", [pytest.param("meta", id="not on the CPU")])
def test_where_it_would_have_to_wait_the_range_is_not_looked_at(device):
    logits, labels = torch.zeros(2, CLASSES, device=device), torch.full((2,), 9, device=device)
    assert label_loss(logits, labels).shape == ()


def test_no_images_are_in_range():
    assert label_loss(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.long)).isnan()
