import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from pdvit.engine import terminal
from pdvit.engine.terminal import Display, describe_rate

MEANS = {"loss": 2.3025, "class": 2.31, "cosine": 0.512, "contrastive": 1.234, "mixing": 2.297, "skipped": 3}
TERMS = ["loss 2.3", "skipped 3", "class 2.31", "cosine 0.512", "contrastive 1.23", "mixing 2.3"]


@pytest.fixture
def shown(monkeypatch):
    """Return a function that shows two steps of 1,000 at two times, and returns the line after each."""

    def show(width: int, label: str, *steps: tuple[int, float], bar: bool = True) -> list[str]:
        now, lines = [0.0], list[str]()
        monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now[0]))
        console = Console(file=io.StringIO(), force_terminal=bar, width=width, no_color=True)
        display = Display(console, total=1000)
        for step, now[0] in steps:
            with console.capture() as captured:
                display.show(step, label, 12345.6, MEANS)
                if bar:
                    console.print(display.bar.get_renderable())
            lines.append(captured.get().rstrip("\n "))
        return lines

    return show


@pytest.mark.parametrize("width", [72, 80, 100, 112, 125, 140])
@pytest.mark.parametrize(("label", "name"), [("epoch 10/24", "epoch 10/24"), ("", "step 400/1000")])
def test_the_progress_line_keeps_bar_rate_and_time_and_shows_the_terms_that_fit(shown, width, label, name):
    _, line = shown(width, label, (100, 5), (400, 35))
    fixed = f"{name} {'━' * 8}{' ' * 14}40% 12,346 img/s, 60 s left "
    texts = [" ".join(TERMS[:count]) for count in range(len(TERMS) + 1)]
    assert line == (fixed + max((text for text in texts if len(fixed + text) <= width), key=len)).rstrip()


@pytest.mark.parametrize("bar", [True, False])
def test_the_time_left_is_estimated_from_what_follows_the_first_step_that_is_shown(shown, bar):
    first, second = shown(140, "", (10, 500), (20, 520), bar=bar)  # 500 s to start, then 2 s a step
    assert " left" not in first
    assert "img/s, 33 min left" in second


def test_rates_below_one_are_seconds_per_image():
    assert list(map(describe_rate, (1234.5, 3.21, 0.04))) == ["1,234 img/s", "3.2 img/s", "25.0 s/img"]
