import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from pdvit.analysis import Analysis, write_analysis, write_between
from pdvit.analysis.measure import COLUMNS
from pdvit.analysis.tables import terminal_tables
from pdvit.definitions import DEFAULT, DEFINITIONS, GROUPS
from pdvit.errors import UserError

LAYERS = ["embed", *(f"block {i}" for i in range(1, 13)), "norm"]


def table(*metrics: str, value: float = 0.25, layers: list[str] = LAYERS) -> pd.DataFrame:
    """A table of equal values, as `analyze` returns it."""
    rows = [("m", layer, i, metric, value, 0.1, 0.01, 9, 196) for metric in metrics for i, layer in enumerate(layers)]
    return pd.DataFrame(rows, columns=COLUMNS)


def columns(*groups: str) -> list[str]:
    return [column for group in groups for column in GROUPS[group]["columns"]]


def analysis(*metrics: str, layers: list[str] = LAYERS, **more) -> Analysis:
    return Analysis(table(*metrics, layers=layers), 9, layers, **more)


def printed(found: pd.DataFrame) -> list[list[str]]:
    """The lines of each table in a terminal of 80 characters."""
    pages = []
    for view in terminal_tables(found):
        page = io.StringIO()
        Console(file=page, width=80).print(view)
        pages.append(page.getvalue().splitlines())
    return pages


@pytest.mark.parametrize("groups", [DEFAULT, tuple(GROUPS)], ids=["default", "all"])
@pytest.mark.parametrize("value", [0.25, 123.4])
def test_every_table_fits_and_every_layer_has_its_line(groups, value):
    values = table(*columns(*groups), value=value)
    values.loc[values["metric"] == "similarity", ["mean", "ci95"]] = [1.0, 0.01]
    shown = printed(values)
    headings = [heading for column in columns(*groups) if (heading := DEFINITIONS[column].heading)]
    for lines in shown:
        assert len(lines) == 1 + len(LAYERS)
        assert [line.split("  ")[0].strip() for line in lines[1:]] == LAYERS
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)
    assert all(heading in " ".join(lines[0] for lines in shown) for heading in headings)
    assert {line.count("█") for line in shown[0][1:]} == {shown[0][0].count("·") + 2}


def test_a_layer_without_a_value_has_a_hyphen_and_large_values_fewer_digits():
    values = table(*columns("drift", "rank"), value=123.456)
    values = values[(values["metric"] != "drift_cosine") | (values["depth"] > 0)]
    ((_, embed, block, *_),) = printed(values)
    assert embed.split() == ["embed", "-", "123.5", "123.5", "123.5"]
    assert block.split() == ["block", "1", "123.5", "123.5", "123.5", "123.5"]
    ((_, embed, *_),) = printed(table(*columns("drift"), value=0.0012))
    assert embed.split() == ["embed", "0.0012", "0.0012"]
    ((headings, *_),) = printed(table(*columns("norms")))
    assert headings.split() == ["layer", "norm", "max/med", "outliers"]  # without P, no "P w/o" them


def test_random_weights_are_a_metric_of_the_same_layers():
    found = analysis("similarity", "norm_mean").with_random(analysis("similarity", "norm_mean")).table
    rows = len(found) // 3
    assert found["metric"].tolist() == ["similarity"] * rows + ["norm_mean"] * rows + ["similarity_random"] * rows
    assert found["layer"][-rows:].tolist() == found["layer"][:rows].tolist()


def test_files_of_an_analysis_replace_those_of_an_earlier_one(tmp_path):
    curves = {"spectrum": {"by_frequency/block 1": np.arange(3.0)}, "cka": {"matrix": np.eye(2)}}
    assert write_analysis(tmp_path, analysis("similarity", curves=curves), {}) == tmp_path / "analysis.csv"
    with np.load(tmp_path / "analysis" / "spectrum.npz") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {"by_frequency/block 1": [0, 1, 2]}
    write_between(tmp_path, {"one": pd.DataFrame([[1.0, 0.5]], ["embed"], ["embed", "norm"])})
    with np.load(tmp_path / "analysis" / "cka_between.npz") as arrays:
        expected = {"matrix/one": [[1.0, 0.5]], "layers/one": ["embed", "norm"], "layers": ["embed"]}
        assert {name: arrays[name].tolist() for name in arrays} == expected
    (tmp_path / "analysis" / "maps.npz").touch()
    again = analysis("similarity", curves={"cka": {"matrix": np.eye(3)}})
    write_analysis(tmp_path, again, {"images_measured": 7})
    assert sorted(file.name for file in (tmp_path / "analysis").iterdir()) == ["analysis.json", "cka.npz"]
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text()) == {"images_measured": 7}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "analysis.csv"), again.table)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        write_analysis(tmp_path / "file", again, {})
