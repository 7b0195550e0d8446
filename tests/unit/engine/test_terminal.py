import signal

import pytest

from pdvit.engine.terminal import STOPPING, stop_on_signals


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_asks_and_a_second_sigint_interrupts_at_once(number):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(number)
        assert (bool(stop), stop.reason) == (True, number.name)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) == before
