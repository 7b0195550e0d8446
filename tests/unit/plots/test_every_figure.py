"""What holds for all figures: both themes, hostile names, letters that can be read, lines that differ, equal bytes."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from pdvit.cli.plot import FIGURES, app, draw_figure
from pdvit.plots.heatmap import plot_confusion, plot_maps
from pdvit.plots.reading import read_arrays, read_run
from pdvit.plots.style import DARK, LIGHT, SINGLE, line_styles, new_figure, render
from pdvit.plots.sweep import plot_sweep, summarise
from pdvit.plots.training import plot_training

HOSTILE = ["$x_1^{2}$ & <b>", "猫\x01\n" + "very-long-" * 20]
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}
NAMES = sorted(COMMANDS - {"segmentation"})  # drawn in test_segmentation.py


@pytest.fixture(scope="module")
def draw(tmp_path_factory, analysis_folder):
    """Return a function that draws a figure from made-up numbers."""
    folder = analysis_folder(tmp_path_factory.mktemp("made") / "run")
    at = {"epoch": [1.0, 2.0]}
    records = {
        "train": pd.DataFrame({**at, "class": [2.0, 1.0]}),
        "eval": pd.DataFrame({**at, "accuracy": [0.5, 0.6]}),
        "similarity": pd.DataFrame({**at, "layers": [["embed", "norm"]] * 2, "similarity": [[0.1, 0.2], [0.3, 0.4]]}),
    }
    matrix = pd.DataFrame({"class": ["a", "b"], "predicted": ["a", "a"], "images": [3, 1]})
    cells = {"cell": ["0", "1"], "status": ["finished"] * 2, "variant": HOSTILE, "accuracy": ["0.5", "0.6"]}

    def make(figure: str, names, theme=LIGHT):
        if needed := FIGURES.get(figure):
            run = read_run(folder, "", needed.group)
            return draw_figure(figure, [replace(run, name=name) for name in names], theme)
        if figure == "maps":
            return plot_maps(read_arrays(folder / "analysis" / "maps.npz", ""), names[0], 0, [(1, 2)], theme)
        if figure == "training":
            return plot_training(dict.fromkeys(names, records), theme)
        if figure == "confusion":
            return plot_confusion(matrix, names[0], theme)
        assert figure == "sweep", "draw the new figure here"
        return plot_sweep(summarise(pd.DataFrame(cells, dtype=object)), names[0], theme)

    return make


def luminance(colour: object) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("theme", "names"), [(LIGHT, ["one", "two"]), (DARK, HOSTILE)], ids=["light", "dark"])
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("figure", NAMES)
def test_letters_can_be_read_in_print_and_hostile_names_are_drawn_as_they_are(draw, figure, theme, names):
    drawing = draw(figure, names, theme)
    assert to_rgb(drawing.get_facecolor()) == to_rgb(theme.paper)
    assert drawing.get_figwidth() >= SINGLE
    inside = {text for axes in drawing.axes if axes.images for text in axes.texts}  # numbers in cells
    for text in drawing.findobj(Text):
        if text.get_text():
            assert text.get_fontsize() >= 6.5
            pair = sorted([luminance(text.get_color()), luminance(theme.paper)])
            assert text in inside or (pair[1] + 0.05) / (pair[0] + 0.05) > 3, text
    assert drawing.data.columns[0] == ("setting" if figure == "sweep" else "run")
    assert len(drawing.data)
    assert not np.isinf(drawing.data.select_dtypes("number")).any(axis=None)
    if names is HOSTILE:
        shown = "".join(ElementTree.fromstring(render(drawing, ".svg")).itertext())
        assert "$x_1" in shown
        assert "\x01" not in shown
    else:  # no title or label is cut off
        drawing.draw_without_rendering()
        texts = [text for axes in drawing.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        np.testing.assert_allclose(Bbox.union([drawing.bbox, *boxes]), drawing.bbox, atol=1)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PDF"])
def test_the_same_numbers_make_the_same_file(suffix):
    files = []
    for _ in range(2):
        with new_figure(pd.DataFrame(), 2, 1) as figure:
            figure.subplots().plot([1, 2], label="one")
            files.append(render(figure, suffix))
    assert files[0] == files[1]


def test_lines_differ_without_colour_and_neighbours_in_grey():
    styles = line_styles(8)
    assert len({(str(style["linestyle"]), style["marker"]) for style in styles}) == 8
    assert len({style["color"] for style in styles}) == 8
    for one, two in pairwise(styles):
        assert str(one["linestyle"]) != str(two["linestyle"])
        assert one["marker"] != two["marker"]
        assert abs(luminance(one["color"]) - luminance(two["color"])) > 0.03


# Linear RGB as dichromats see it: Machado, Oliveira & Fernandes 2009, severity 1.
SEEN = {
    "by all": np.eye(3),
    "without red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "without green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "without blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_colours_of_lines_differ_for_all_eyes(theme, seen):
    """By more than 10 in CIELAB; 2 is just visible."""
    rgb = np.array([to_rgb(colour) for colour in theme.colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.transpose(SEEN[seen])
    xyz = linear.clip(0, 1) @ np.transpose(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    ratio = xyz / (0.9505, 1, 1.089)
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116).T
    points = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    assert distances[np.triu_indices(len(points), 1)].min() > 10


def test_the_style_stays_inside_and_needs_no_screen():
    before = dict(mpl.rcParams)
    with new_figure(pd.DataFrame(), 4, 3) as figure:
        assert figure.get_size_inches().tolist() == [4, 3]
    assert dict(mpl.rcParams) == before
    assert mpl.get_backend().lower() == "agg"
