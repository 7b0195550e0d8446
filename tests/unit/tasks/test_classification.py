import math

import torch
from torch import nn

from pdvit.data.batch import Batch
from pdvit.tasks.classification import predict


def test_the_best_classes_come_with_their_probabilities_in_order():
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.2, 0.6]]).log()
    batches = [
        Batch(logits[:2], torch.zeros(2), torch.tensor([0, 2])),
        Batch(logits[2:], torch.zeros(1), torch.tensor([3])),
    ]
    found = list(predict(nn.Identity(), batches, 2, "fp32"))
    assert [item.image for item in found] == [0, 2, 3]
    assert [item.classes[0] for item in found] == [1, 0, 2]
    assert found[0].classes == [1, 2]
    torch.testing.assert_close(torch.tensor(found[0].probabilities), torch.tensor([0.7, 0.2]))
    assert all(item.finite for item in found)


def test_logits_that_are_no_numbers_are_marked():
    logits = torch.tensor([[0.0, math.nan], [0.0, 1.0], [math.inf, 0.0]])
    found = predict(nn.Identity(), [Batch(logits, torch.zeros(3), torch.arange(3))], 1, "fp32")
    assert [item.finite for item in found] == [False, True, False]
