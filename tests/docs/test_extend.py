import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python([^\n]*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("options", "example"), [case[1:] for case in EXAMPLES], ids=[case[0] for case in EXAMPLES])
def test_the_example_runs_as_printed(options, example, tmp_path):
    """In a process of its own, as its libraries warn about many things."""
    needs = re.search(r"needs=(\S+)", options)
    for name in needs[1].split(",") if needs else ():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (an extra of pdvit)")
    if "file=" in options:
        (tmp_path / "train.py").write_text(
            "import timm.task\nassert timm.task.ClassificationTask.func.__name__ == 'DiversityTask'\n"
        )
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_ways_are_shown():
    assert len(EXAMPLES) == 5
