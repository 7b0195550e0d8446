import numpy as np
import pytest
from scipy import stats

from pdvit.plots.compare import differences, plot_compare
from pdvit.plots.reading import read_analysis


def table_of(analysis_table, samples: np.ndarray):
    """The table of an analysis with these values of P, images by layer."""
    table = analysis_table(samples.mean(0).tolist(), images=len(samples))
    return table.assign(std=np.tile(samples.std(0, ddof=1), (2, 1)).T.ravel())


def test_the_difference_has_the_interval_of_scipy(analysis_table):
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.4, 0.1, (8, 4)), rng.normal(0.6, 0.02, (20, 4))
    found = differences([table_of(analysis_table, one), table_of(analysis_table, two)], "similarity")
    expected = stats.ttest_ind(two, one, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(found["mean"], two.mean(0) - one.mean(0))
    np.testing.assert_allclose(found[["low", "high"]].to_numpy().T, [expected.low, expected.high])


def test_both_curves_and_what_lies_between_are_drawn(tmp_path, analysis_folder):
    tables = [read_analysis(analysis_folder(tmp_path / f"{seed}", seed=seed)) for seed in range(2)]
    figure = plot_compare(tables, ["one", "two"])
    curves, between = figure.axes[:2]
    apart = differences(tables, "similarity")
    assert curves.lines[0].get_ydata().tolist() == tables[0][tables[0]["metric"] == "similarity"]["mean"].tolist()
    assert between.containers[0].lines[0].get_xdata().tolist() == [0, 1, 2, 3, 4]
    assert between.containers[0].lines[0].get_ydata().tolist() == apart["mean"].tolist()
    assert "P of two" in between.get_title(loc="left")
    assert figure.data[figure.data["run"] == "difference"]["low"].tolist() == apart["low"].tolist()


def test_only_metrics_of_both_have_a_panel(tmp_path, analysis_folder):
    one, two = (read_analysis(analysis_folder(tmp_path / f"{seed}", seed=seed)) for seed in range(2))
    two = two[two["metric"] != "norm_mean"]
    titles = [axes.get_title(loc="left") for axes in plot_compare([one, two], ["one", "two"]).axes]
    assert "token length, std" in titles
    assert "token length, mean" not in titles


def test_layers_are_matched_by_name_where_depths_differ(analysis_table):
    tables = [analysis_table([0.1, 0.2, 0.3]), analysis_table([0.1, 0.2, 0.6, 0.8])]
    found = differences(tables, "similarity")
    assert found["layer"].tolist() == ["embed", "block 1", "norm"]
    assert found["mean"].tolist() == pytest.approx([0, 0, 0.5])
    plot_compare(tables, ["one", "two"])


def test_a_single_image_has_a_difference_without_an_interval(analysis_table):
    tables = [analysis_table([0.1, 0.2, 0.3], std=float("nan"), images=1)] * 2
    assert differences(tables, "similarity")["low"].isna().all()
    plot_compare(tables, ["one", "two"])
