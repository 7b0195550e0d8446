import pytest

from pdvit.plots.metrics import plot_metrics
from pdvit.plots.reading import read_analysis


@pytest.fixture
def tables(tmp_path, analysis_folder):
    return [read_analysis(analysis_folder(tmp_path / f"{seed}", seed=seed)) for seed in range(2)]


def panels(figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def test_every_metric_has_a_panel_with_a_line_for_each_run(tables):
    figure = plot_metrics(tables, ["one", "two"])
    found = panels(figure)
    # the reference belongs to the panel of P, and a metric that figures do not know is drawn under its name
    assert len(found) == tables[0]["metric"].nunique() - 1
    assert "new metric" in found
    for number, table in enumerate(tables):
        expected = table[table["metric"] == "norm_mean"]["mean"].tolist()
        assert found["token length, mean"].lines[number].get_ydata().tolist() == expected
    assert len(found["P, mean |cos|"].lines) == 4


def test_a_metric_of_blocks_only_stands_at_its_blocks(tables):
    axes = panels(plot_metrics(tables, ["one", "two"]))["attention entropy, nats"]
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert axes.get_xlim() == panels(plot_metrics(tables, ["one", "two"]))["P, mean |cos|"].get_xlim()


def test_a_metric_that_one_run_lacks_has_the_other_line(tables):
    less = tables[1][tables[1]["metric"] != "norm_mean"]
    (line,) = panels(plot_metrics([tables[0], less], ["one", "two"]))["token length, mean"].lines
    assert line.get_color() == "#3f90da"


def test_bands_end_where_the_metric_does(tables):
    table = tables[0].assign(std=5.0)
    for title, axes in panels(plot_metrics([table], ["one"])).items():
        heights = axes.collections[0].get_paths()[0].vertices[:, 1]
        if title == "P, mean |cos|":
            assert (heights.min(), heights.max()) == (0, 1)
        if title == "token length, mean":
            assert heights.min() == 0


def test_the_data_are_the_tables(tables):
    data = plot_metrics(tables, ["one", "two"]).data
    assert len(data) == sum(map(len, tables))
    assert list(data.columns[:4]) == ["run", "layer", "depth", "metric"]


def test_two_runs_of_one_name_are_told_apart(tables):
    assert plot_metrics(tables, ["one", "one"]).data["run"].unique().tolist() == ["one", "one (2)"]
