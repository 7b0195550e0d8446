import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python([^\n]*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


CASES = [pytest.param("cpu", *case[1:], id=case[0]) for case in EXAMPLES]
CASES += [
    pytest.param("cuda", *case[1:], id=f"{case[0]} on a GPU", marks=pytest.mark.gpu)
    for case in EXAMPLES
    if "cuda" in case[2]
]


@pytest.mark.parametrize(("device", "options", "example"), CASES)
def test_the_example_runs_as_printed(device, options, example, tmp_path):
    """In a process of its own, as its libraries warn about many things."""
    needs = re.search(r"needs=(\S+)", options)
    for name in needs[1].split(",") if needs else ():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (an extra of pdvit)")
    if "file=" in options:
        (tmp_path / "train.py").write_text(
            "import timm.task\nassert timm.task.ClassificationTask.func.__name__ == 'DiversityTask'\n"
        )
    seen = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=seen, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_ways_are_shown():
    assert len(EXAMPLES) == 5
    assert len(CASES) == 6
