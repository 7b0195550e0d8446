import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pdvit.plots.norms import plot_norms
from pdvit.plots.reading import read_analysis


def values(table, metric: str) -> list[float]:
    return table[table["metric"] == metric].sort_values("depth")["mean"].tolist()


@pytest.fixture
def table(tmp_path, analysis_folder):
    return read_analysis(analysis_folder(tmp_path / "run"))


def test_mean_spread_peak_and_outliers_are_the_table(table):
    length, peak, outliers = plot_norms([table], ["one"]).axes
    assert length.lines[0].get_ydata().tolist() == values(table, "norm_mean")
    assert peak.lines[0].get_ydata().tolist() == values(table, "norm_peak")
    assert outliers.lines[0].get_ydata().tolist() == pytest.approx([100 * v for v in values(table, "norm_outliers")])
    corners = length.collections[0].get_paths()[0].vertices
    for depth, (mean, spread) in enumerate(zip(values(table, "norm_mean"), values(table, "norm_std"), strict=True)):
        assert corners[corners[:, 0] == depth, 1].max() == pytest.approx(mean + spread)


def test_lengths_of_very_different_size_are_drawn_on_a_logarithmic_axis(table):
    assert plot_norms([table.assign(mean=1.0)], ["one"]).axes[0].get_yscale() == "linear"
    table.loc[table["layer"] == "norm", "mean"] = 1e3
    axes = plot_norms([table], ["one"]).axes[0]
    assert axes.get_yscale() == "log"
    FigureCanvasAgg(axes.figure).draw()
    assert {"1", "100"} <= {text.get_text() for text in axes.get_yticklabels()}


def test_the_data_hold_these_metrics_alone(table):
    expected = {"norm_mean", "norm_std", "norm_peak", "norm_outliers"}
    assert set(plot_norms([table], ["one"]).data["metric"]) == expected
