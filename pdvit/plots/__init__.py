"""Figures from the files of run directories, and of analyses in memory (`similarity`); no torch."""

import os
from importlib.util import find_spec
from typing import Any

# A notebook's commands inherit its backend. Matplotlib can't be imported where that is missing; figures need none.
if os.environ.get("MPLBACKEND", "").startswith("module://matplotlib_inline") and not find_spec("matplotlib_inline"):
    del os.environ["MPLBACKEND"]


def __getattr__(name: str) -> Any:
    if name != "similarity":
        raise AttributeError(f"module 'pdvit.plots' has no attribute '{name}'")
    from pdvit.plots.depth import similarity  # imports matplotlib

    return similarity
