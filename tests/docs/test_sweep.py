import re
import tomllib
from pathlib import Path

from pdvit.sweep import make_cells, split

PAGE = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text(encoding="utf-8")


def test_the_examples_of_the_docs_are_a_sweep():
    block, further = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    base, table = split(tomllib.loads(block), "comparison.toml")
    cells = make_cells(base, table, "comparison.toml")
    assert len(cells) == 2 * 3 * 3
    assert f"  {cells[0].name}/" in PAGE
    assert cells[4].name == "cosine-lr=0.001-seed=0"
    assert (cells[4].config.diversity.preset, cells[4].config.diversity.cosine) == ("none", 1)
    again = make_cells(base | tomllib.loads(further), table, "further.toml")
    assert again[6].config.model.init == "runs/comparison/baseline-lr=0.001-seed=1"
