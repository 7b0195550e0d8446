import time
from itertools import count

import pytest

from pdvit.engine import clock as clock_module
from pdvit.engine.clock import Clock


@pytest.fixture
def seconds(monkeypatch):
    """A clock that shows one more second each time somebody looks."""
    ticks = count()
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: float(next(ticks)))
    return ticks


def test_each_second_belongs_to_one_phase(seconds):
    clock = Clock({})
    for phase in ("data", "step", "data", "step"):
        clock.enter(phase)
    assert clock.spent == {"data": 2.0, "step": 1.0}  # the last one still runs, and the start is nobody's


def test_a_phase_between_goes_back_to_the_one_that_ran(seconds):
    clock = Clock({"step": 10.0})
    clock.enter("step")
    with clock.during("save"):
        pass
    clock.enter("data")
    assert clock.spent == {"step": 12.0, "save": 1.0}


def test_a_phase_that_fails_is_counted_too():
    clock = Clock({})
    clock.enter("step")

    def fail():
        with clock.during("save"):
            time.sleep(0.01)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert clock.spent["save"] >= 0.01
    assert clock.phase == "step"
