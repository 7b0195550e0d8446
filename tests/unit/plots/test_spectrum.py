import pytest

from pdvit.plots.reading import read_analysis, read_curves
from pdvit.plots.spectrum import NEEDED, plot_spectrum


@pytest.fixture
def run(tmp_path, analysis_folder):
    return analysis_folder(tmp_path / "run")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_layer_is_a_line_and_the_dc_share_the_last_panel(run, count):
    arrays, table = read_curves(run, "spectrum", NEEDED), read_analysis(run)
    figure = plot_spectrum([arrays] * count, [table] * count, [f"run-{number}" for number in range(count)])
    titles = {axes.get_title(loc="left"): axes for axes in figure.axes}
    for number in range(count):
        lines = titles[f"run-{number}"].lines
        assert len(lines) == 5
        assert lines[1].get_xdata().tolist() == [0, 0.5, 1]
        assert lines[1].get_ydata().tolist() == arrays["by_frequency/block 1"].tolist()
    shares = titles["DC share of energy"].lines
    assert [line.get_ydata().tolist() for line in shares] == [
        table[table["metric"] == "dc_share"]["mean"].tolist()
    ] * count


def test_the_data_are_curves_and_shares(run):
    data = plot_spectrum([read_curves(run, "spectrum", NEEDED)], [read_analysis(run)], ["one"]).data
    assert data["metric"].value_counts().to_dict() == {"by_frequency": 15, "dc_share": 5}
