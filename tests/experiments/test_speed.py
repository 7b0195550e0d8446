"""The commands in experiments/speed/README.md, against the flags of the scripts."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "experiments" / "speed" / "README.md").read_text(encoding="utf-8")
GPU = re.findall(r'GPU="(.*)"', TEXT)
COMMANDS = re.findall(r"^python experiments/speed/(\w+)\.py(.*)$", TEXT.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize(("script", "flags"), COMMANDS)
def test_every_command_has_flags_that_its_script_knows(monkeypatch, script, flags):
    given = shlex.split(flags.replace("$GPU", *GPU))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
    found = vars(importlib.import_module(script).arguments())
    assert {flag.lstrip("-").replace("-", "_") for flag in given if flag.startswith("--")} <= found.keys()
    assert "$GPU" not in flags or (found["device"], found["precision"], found["compile"]) == ("cuda", "bf16", True)
