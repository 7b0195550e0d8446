from types import SimpleNamespace

import pytest
import torch

from pdvit.engine.recovery import largest


@pytest.mark.parametrize("limit", [1, 5, 8, 300])
@pytest.mark.parametrize("memory", [0, 1, 7, 8, 300])
def test_the_largest_power_of_two_or_the_limit_that_fits_is_found(limit, memory):
    def backward(images, micro_batch):
        assert images == micro_batch <= limit
        if images > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")

    updater = SimpleNamespace(backward=backward)
    batch = SimpleNamespace(repeat=lambda size: size)
    powers = [2**power for power in range(10) if 2**power <= min(limit, memory)]
    assert largest(updater, batch, limit) == (limit if limit <= memory else max(powers, default=0))
    updater.backward = lambda images, micro_batch: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):  # an error that is not about memory
        largest(updater, batch, limit)
