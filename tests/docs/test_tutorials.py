"""The tutorials run from top to bottom, cell by cell, without Jupyter."""

import json

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from pdvit.errors import UserError
from tests.docs.pages import ROOT

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: file.stem)
def test_the_tutorial_runs_as_printed(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    space: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), file.name, "exec")
            printed = [line for output in cell["outputs"] for line in output.get("traceback", ())]
            if printed:
                with pytest.raises(UserError) as error:
                    exec(code, space)
                assert error.value._render_traceback_() == printed
            else:
                exec(code, space)
    plt.close("all")
