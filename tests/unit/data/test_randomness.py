import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pdvit.data.randomness import fold, uniform


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def test_fold_is_a_known_function_of_its_numbers():
    # the first outputs of SplitMix64 from state 0, as its author's C code prints them, without the last bit
    assert fold(0) == 0xE220A8397B1DCDAF >> 1
    assert fold(1) == 0x6E789E6AA1B965F4 >> 1
    assert fold(2) == 0x06C45D188009454F >> 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**62), indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=20), data=st.data())
def test_a_sample_has_the_same_numbers_whichever_batch_it_is_in(seed, indices, data):
    together = uniform(seed, torch.tensor(indices), 3)
    assert together.dtype == torch.float32
    assert ((together >= 0) & (together < 1)).all()
    order = data.draw(st.permutations(range(len(indices))))
    assert torch.equal(uniform(seed, torch.tensor(indices)[list(order)], 3), together[list(order)])
    for index, row in zip(indices, together, strict=True):
        assert torch.equal(uniform(seed, torch.tensor([index]), 3)[0], row)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40])
def test_uniform_numbers_look_uniform_and_independent(seed):
    found = uniform(seed, torch.arange(20_000), 4)
    assert found.mean().item() == pytest.approx(1 / 2, abs=0.005)
    assert found.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert stats.kstest(found.flatten().numpy(), "uniform").pvalue > 0.001
    assert abs(correlation(found[1:], found[:-1])) < 0.02  # neighbouring samples
    assert abs(correlation(found[:, 1:], found[:, :-1])) < 0.02  # neighbouring draws
    assert abs(correlation(found, uniform(seed + 1, torch.arange(20_000), 4))) < 0.02  # neighbouring seeds
