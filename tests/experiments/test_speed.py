"""The commands in experiments/speed/README.md, against the flags of the scripts; turns of processes side by side."""

import importlib
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from train_step import Side

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


# Writes records as timm's script does where an epoch has two steps: of the first and of the last.
EPOCHS = """
import time
for epoch in range(1000):
    for update in range(2):
        print(f"Train: {epoch} [{update:>4d}/2 (50%)]", flush=True)
        time.sleep(0.05)
"""


def test_a_turn_is_as_long_as_asked_where_an_epoch_ends_in_it(tmp_path):
    side = Side("timm", [sys.executable, "-c", EPOCHS], tmp_path, 1)
    try:
        assert side.turn(1)[0] >= 1
        assert [side.turn(3)[0] >= 3 for _ in range(3)] == [True] * 3
    finally:
        side.signal(signal.SIGKILL)
        side.process.wait()
