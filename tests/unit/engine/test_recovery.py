from hypothesis import given
from hypothesis import strategies as st

from pdvit.engine.recovery import largest


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
