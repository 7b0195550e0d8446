"""Tables and examples of the docs are those of the code."""

import re
import runpy
import tomllib

import pytest

from pdvit.models.families import FAMILIES
from pdvit.sweep import make_cells
from tests.docs.pages import ROOT, blocks, read


@pytest.mark.parametrize(("table", "page"), [("settings", "settings"), ("metrics", "metrics"), ("curves", "metrics")])
def test_a_table_is_the_one_that_the_code_gives(table, page):
    given = runpy.run_path(str(ROOT / "docs" / "tables.py"))[table]()
    assert given in read(f"docs/{page}.md"), "copy the output of `python docs/tables.py`"


def test_the_docs_have_a_row_for_each_family():
    rows = re.findall(r"^\| (`[A-Z].*?`) \|", read("docs/losses.md"), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(FAMILIES)


def test_the_examples_of_a_sweep_are_one():
    page = read("docs/sweep.md")
    block, further = blocks(page, "toml")
    base = tomllib.loads(block)
    table = base.pop("sweep")
    cells = make_cells(base, table, "comparison.toml")
    assert len(cells) == 2 * 3 * 3
    assert f"  {cells[0].name}/" in page
    assert cells[4].name == "cosine-lr=0.001-seed=0"
    assert (cells[4].config.diversity.preset, cells[4].config.diversity.cosine) == ("none", 1)
    again = make_cells(base | tomllib.loads(further), table, "further.toml")
    assert again[6].config.model.init == "runs/comparison/baseline-lr=0.001-seed=1"
