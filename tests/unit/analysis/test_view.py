import io

import pandas as pd
import pytest
from rich.console import Console

from pdvit.analysis.metrics import DEFAULT, METRICS
from pdvit.analysis.view import tables

LAYERS = ["embed", *(f"block {i}" for i in range(1, 13)), "norm"]


def analysis(*groups: str, value: float = 0.25) -> pd.DataFrame:
    """A table of equal values, as `analyze` returns it."""
    rows = [
        ("m", layer, depth, column, value, 0.1, 0.01, 9, 196)
        for group in groups
        for column in METRICS[group].columns
        for depth, layer in enumerate(LAYERS)
    ]
    columns = ["model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens"]
    return pd.DataFrame(rows, columns=columns)


def printed(table: pd.DataFrame, width: int) -> list[list[str]]:
    """The lines of each table, as a terminal of that width shows them."""
    found = []
    for view in tables(table, width):
        page = io.StringIO()
        Console(file=page, width=width).print(view)
        found.append(page.getvalue().splitlines())
    return found


@pytest.mark.parametrize("width", [80, 100, 120, 240])
@pytest.mark.parametrize("groups", [DEFAULT, tuple(METRICS)], ids=["default", "all"])
def test_every_table_fits_and_every_layer_has_its_line(groups, width):
    shown = printed(analysis(*groups), width)
    headings = [heading for group in groups for heading in METRICS[group].shown.values()]
    for lines in shown:
        assert len(lines) == 1 + len(LAYERS)
        assert [line.split("  ")[0].strip() for line in lines[1:]] == LAYERS
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines)
    first = " ".join(lines[0] for lines in shown)
    assert all(heading in first for heading in headings)
    assert (len(shown) == 1) == (groups == DEFAULT or width == 240)


@pytest.mark.parametrize(("width", "bar"), [(80, 14), (120, 24)])
def test_the_bar_takes_what_room_is_left(width, bar):
    ((heading, *lines),) = printed(analysis(*DEFAULT, value=1.0), width)
    assert heading.count("·") == bar - 2
    assert {line.count("█") for line in lines} == {bar}


def test_a_layer_without_a_value_has_a_hyphen_and_large_values_fewer_digits():
    table = analysis("drift", "rank", value=123.456)
    table = table[(table["metric"] != "drift_cosine") | (table["depth"] > 0)]
    ((_, embed, *rest),) = printed(table, 80)
    assert embed.split() == ["embed", "-", "123.5", "123.5", "123.5"]
    assert rest[0].split() == ["block", "1", "123.5", "123.5", "123.5", "123.5"]
    ((_, embed, *_),) = printed(analysis("drift", value=0.0012), 80)
    assert embed.split() == ["embed", "0.0012", "0.0012"]


def test_one_image_has_no_interval():
    table = analysis("similarity", "similarity_signed")
    ((heading, line, *_),) = printed(table.assign(ci95=float("nan")), 80)
    assert heading.split()[:5] == ["layer", "P", "±", "95", "%"]
    assert line.split()[:4] == ["embed", "0.250", "-", "+0.250"]
