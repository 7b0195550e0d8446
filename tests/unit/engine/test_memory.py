import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdvit.engine.memory import is_out_of_memory, largest


@given(limit=st.integers(0, 300), most=st.integers(1, 300))
def test_the_largest_power_of_two_that_fits_or_all(limit, most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    found = largest(fits, most)
    powers = [2**n for n in range(10) if 2**n <= min(limit, most)]
    assert found == (most if limit >= most else max(powers, default=0))
    assert all(size <= most for size in tried)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (MemoryError(), False),
    ],
)
def test_only_a_full_device_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected
