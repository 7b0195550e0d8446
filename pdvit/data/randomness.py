"""Random numbers as a function of (seed, epoch or step, sample index) alone: not of rank, worker or earlier draws."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio: the increment of SplitMix64
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def fold(*numbers: int) -> int:
    """Hash whole numbers to one of 63 bits (SplitMix64's finaliser); a seed for any generator."""
    state = 0
    for number in numbers:
        state = (state + number + 1) * _GOLDEN & _MASK
        state = (state ^ state >> 30) * _FACTORS[0] & _MASK
        state = (state ^ state >> 27) * _FACTORS[1] & _MASK
        state ^= state >> 31
    return state >> 1


def uniform(seed: int, indices: Tensor, draws: int) -> Tensor:
    """Return `draws` numbers in [0, 1) for each sample: float32 `(len(indices), draws)`, the same in any batch."""

    def shift(state: Tensor, bits: int) -> Tensor:  # fills with zeros, where torch copies the sign
        return (state >> bits) & ((1 << (64 - bits)) - 1)

    counters = indices.long()[:, None] * draws + torch.arange(draws, device=indices.device)
    # less 2^64: the int64 of the same bits, whose products wrap as unsigned ones do
    state = counters * (_GOLDEN - 2**64) + fold(seed)
    state = (state ^ shift(state, 30)) * (_FACTORS[0] - 2**64)
    state = (state ^ shift(state, 27)) * (_FACTORS[1] - 2**64)
    state = state ^ shift(state, 31)
    return shift(state, 40).float() * 2.0**-24  # float32 holds 24 bits exactly


def normal(seed: int, index: Tensor, draws: int) -> Tensor:
    """Return `draws` normal numbers for each sample, `(len(index), draws)`, float32: by Box and Muller."""
    first, second = uniform(seed, index, draws + draws % 2).chunk(2, dim=1)
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :draws]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that timm and torchvision draw from on the CPU, and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
