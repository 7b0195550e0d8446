import os
import signal

import pytest

from pdvit.engine.terminal import STOPPING, stop_on_signals


def send(number):
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in STOPPING]


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_asks(number):
    with stop_on_signals() as stop:
        assert not stop
        send(number)
        assert stop
    assert stop.reason == number.name


def test_a_second_sigint_interrupts_at_once():
    with stop_on_signals() as stop:
        send(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_the_handlers_before_come_back():
    before = handlers()
    with stop_on_signals():
        assert handlers() != before
        send(signal.SIGTERM)
    assert handlers() == before
