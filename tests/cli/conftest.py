import json
from functools import partial

import pytest

from pdvit.cli import run as pdvit

CPU = ["--device", "cpu", "--workers", "0"]


@pytest.fixture
def printed(capsys):
    """Return a function that runs a command on the CPU with --json and returns what was printed: nothing else."""

    def run(command: str, *arguments: object):
        capsys.readouterr()
        assert pdvit([command, *CPU, *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def evaluated(printed):
    return partial(printed, "eval")


@pytest.fixture
def analyzed(printed):
    return partial(printed, "analyze")
