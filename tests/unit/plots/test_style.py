from itertools import pairwise

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from pdvit.plots.style import line_styles, new_figure


@pytest.mark.parametrize("count", [0, 1, 8, 30])
def test_there_are_as_many_looks_as_lines(count):
    assert len(line_styles(count)) == count


def test_lines_differ_without_colour():
    greyscale = [(str(look["linestyle"]), look["marker"]) for look in line_styles(8)]
    assert len(set(greyscale)) == 8
    assert len({look["color"] for look in line_styles(8)}) == 8


def test_neighbours_differ_in_dashes_marker_and_grey():
    found = line_styles(8)
    for one, two in pairwise(found):
        assert str(one["linestyle"]) != str(two["linestyle"])
        assert one["marker"] != two["marker"]
        assert abs(luminance(one["color"]) - luminance(two["color"])) > 0.03


def luminance(colour: str) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_style_stays_inside():
    before = dict(mpl.rcParams)
    with new_figure(4, 3, rows=2, columns=3) as figure:
        assert figure.get_size_inches().tolist() == [4, 3]
        assert len(figure.axes) == 6
        plt.close(figure)
    assert dict(mpl.rcParams) == before


def test_drawing_needs_no_screen():
    assert mpl.get_backend().lower() == "agg"
