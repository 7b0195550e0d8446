import importlib.util
import sys
from pathlib import Path

import pytest

# The scripts there import one another as scripts do.
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "speed")]


@pytest.fixture
def load():
    """Import a script of a question's folder, whose name another folder may have too."""

    def imported(file: Path):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return imported
