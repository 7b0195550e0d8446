"""What holds for all kinds of figures: both themes, hostile names, letters that can be read, the same bytes twice."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from pdvit.plots.curves import plot_pairs, plot_spectrum
from pdvit.plots.depth import plot_attention, plot_compare, plot_metrics, plot_norms, plot_similarity
from pdvit.plots.heatmap import plot_cka, plot_confusion, plot_maps, read_maps
from pdvit.plots.reading import read_analysis, read_curves
from pdvit.plots.style import DARK, LIGHT, SINGLE, render
from pdvit.plots.sweep import plot_sweep, summarise
from pdvit.plots.training import plot_training

HOSTILE = ["$x_1^{2}$ & <b>", "猫\x01\n" + "very-long-" * 20]


@pytest.fixture(scope="module")
def draw(tmp_path_factory, analysis_folder):
    """Return a function that draws a kind of figure from made-up numbers."""
    run = analysis_folder(tmp_path_factory.mktemp("made") / "run")
    table, curves = read_analysis(run), lambda group: read_curves(run, group, ())
    at = {"epoch": [1.0, 2.0]}
    records = {
        "train": pd.DataFrame({**at, "class": [2.0, 1.0]}),
        "eval": pd.DataFrame({**at, "accuracy": [0.5, 0.6]}),
        "similarity": pd.DataFrame({**at, "layers": [["embed", "norm"]] * 2, "similarity": [[0.1, 0.2], [0.3, 0.4]]}),
    }
    matrix = pd.DataFrame({"class": ["a", "b"], "predicted": ["a", "a"], "images": [3, 1]})
    cells = {"cell": ["0", "1"], "status": ["finished"] * 2, "variant": HOSTILE, "accuracy": ["0.5", "0.6"]}
    kinds = {
        "similarity": lambda names, theme: plot_similarity([table] * 2, names, theme),
        "metrics": lambda names, theme: plot_metrics([table] * 2, names, theme),
        "norms": lambda names, theme: plot_norms([table] * 2, names, theme),
        "compare": lambda names, theme: plot_compare([table] * 2, names, theme),
        "pairs": lambda names, theme: plot_pairs([curves("pairs")] * 2, names, theme),
        "attention": lambda names, theme: plot_attention([curves("attention")] * 2, [table] * 2, names, theme),
        "spectrum": lambda names, theme: plot_spectrum([curves("spectrum")] * 2, [table] * 2, names, theme),
        "cka": lambda names, theme: plot_cka([curves("cka")] * 2, names, theme=theme),
        "maps": lambda names, theme: plot_maps(read_maps(run), names[0], theme=theme),
        "training": lambda names, theme: plot_training([records] * 2, names, theme),
        "confusion": lambda names, theme: plot_confusion(matrix, names[0], theme),
        "sweep": lambda names, theme: plot_sweep(summarise(pd.DataFrame(cells, dtype=object)), names[0], theme),
    }
    return lambda kind, names=("one", "two"), theme=LIGHT: kinds[kind](list(names), theme)


KINDS = ["similarity", "metrics", "norms", "compare", "pairs", "attention", "spectrum", "cka", "maps", "training"]
KINDS += ["confusion", "sweep"]


def luminance(colour: object) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_letters_stand_out_from_the_paper(draw, kind, theme):
    figure = draw(kind, theme=theme)
    assert to_rgb(figure.get_facecolor()) == to_rgb(theme.paper)
    inside = {text for axes in figure.axes if axes.images for text in axes.texts}  # numbers in cells
    for text in set(figure.findobj(Text)) - inside:
        if text.get_text():
            pair = sorted([luminance(text.get_color()), luminance(theme.paper)])
            assert (pair[1] + 0.05) / (pair[0] + 0.05) > 3, text


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_are_drawn_as_they_are(draw, kind):
    shown = "".join(ElementTree.fromstring(render(draw(kind, HOSTILE), ".svg")).itertext())
    assert "$x_1" in shown
    assert "\x01" not in shown


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PDF"])
def test_the_same_numbers_make_the_same_file(draw, suffix):
    assert render(draw("norms"), suffix) == render(draw("norms"), suffix)


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_begin_with_whose_they_are_and_are_complete(draw, kind):
    data = draw(kind).data
    assert data.columns[0] == ("setting" if kind == "sweep" else "run")
    assert len(data)
    assert not any(np.isinf(data[column]).any() for column in data.select_dtypes("number"))


@pytest.mark.parametrize("kind", KINDS)
def test_letters_can_be_read_in_print(draw, kind):
    figure = draw(kind)
    assert figure.get_figwidth() >= SINGLE
    assert all(text.get_fontsize() >= 6.5 for text in figure.findobj(Text) if text.get_text())
