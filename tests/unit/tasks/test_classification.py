import math

import torch
from torch import nn

from pdvit.data.loader import Batch
from pdvit.tasks.classification import predict


def test_the_best_classes_come_with_their_probabilities_in_order():
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.2, 0.6]]).log()
    logits[2, 0] = math.nan
    parts = [(logits[:2], [0, 2]), (logits[2:], [3])]
    batches = [Batch(part, torch.zeros(len(part)), torch.tensor(index)) for part, index in parts]
    images, classes, probabilities, finite = zip(*predict(nn.Identity(), batches, 2, "fp32"), strict=True)
    assert images == (0, 2, 3)
    assert classes[:2] == ([1, 2], [0, 2])
    torch.testing.assert_close(torch.tensor(probabilities[0]), torch.tensor([0.7, 0.2]))
    assert finite == (True, True, False)
