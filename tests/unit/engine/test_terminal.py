import io

import pytest
from rich.console import Console

from pdvit.engine.terminal import Display, describe_rate

MEANS = {"loss": 2.3025, "class": 2.31, "cosine": 0.512, "contrastive": 1.234, "mixing": 2.297, "skipped": 3}


@pytest.mark.parametrize(
    ("width", "left_out", "label", "shown"),
    [(80, "cosine", "epoch 10/24", "epoch 10/24"), (140, "…", "", "step 400/1000")],
)
def test_the_progress_line_keeps_bar_rate_and_time_and_cuts_terms_first(width, left_out, label, shown):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, no_color=True)
    display = Display(console, total=1000)
    display.show(400, label, 12345.6, MEANS)
    with console.capture() as captured:
        console.print(display.bar.get_renderable())
    line = captured.get().rstrip("\n")
    assert "\n" not in line
    assert all(part in line for part in (f"{shown} ━", " 40% 12,346 img/s ", ":--", "loss 2.3 skipped 3"))
    assert (" mixing 2.3" in line) == (width == 140)
    assert left_out not in line


def test_rates_below_one_are_seconds_per_image():
    assert list(map(describe_rate, (1234.5, 3.21, 0.04))) == ["1,234 img/s", "3.2 img/s", "25.0 s/img"]
