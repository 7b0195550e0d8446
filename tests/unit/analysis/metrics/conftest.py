import pytest
import torch
from torch import Tensor


@pytest.fixture
def gaussian():
    """Return a function that makes random tokens `(B, N, D)`."""

    def make(*shape: int, seed: int = 0, shift: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift

    return make
