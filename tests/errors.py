"""What an error of the user has to say."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pdvit.errors import UserError


def check(error: UserError, what: str = "", where: str = "", tip: str = "") -> None:
    """Look for a text in each part of an error."""
    assert what in error.what, error
    assert where in error.where, error
    assert tip in error.tip, error


@contextmanager
def refused(what: str = "", where: str = "", tip: str = "") -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with these texts."""
    with pytest.raises(UserError) as caught:
        yield caught
    check(caught.value, what, where, tip)
