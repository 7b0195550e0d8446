import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm.task
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^##? ([^\n]+)\n(?:(?!^## ).)*?^```python([^\n]*)\n(.*?)^```", PAGE, re.M | re.DOTALL)
CASES = [pytest.param("cpu", *case, id=name) for name, *case in EXAMPLES]
ON_GPU = [(name, *case) for name, *case in EXAMPLES if "cuda" in case[1]]
CASES += [pytest.param("cuda", *case, id=f"{name} on a GPU", marks=pytest.mark.gpu) for name, *case in ON_GPU]
# In place of timm's script.
TRAIN = "import timm.task\nassert timm.task.ClassificationTask.func.__name__ == 'DiversityTask'\n"


@pytest.mark.parametrize(("device", "options", "example"), CASES)
def test_the_example_runs_as_printed(device, options, example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN)
    if needs := re.search(r"needs=(\S+)", options):
        if missing := [name for name in needs[1].split(",") if importlib.util.find_spec(name) is None]:
            pytest.skip(f"{missing} is not installed (an extra of pdvit)")
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", example], env=hidden, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.setattr(timm.task, "ClassificationTask", timm.task.ClassificationTask)  # an example replaces it
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm
        exec(compile(example, "extend.md", "exec"), {"__name__": "__main__"})
