"""Figures from the files of run directories; no torch."""

import os
from importlib.util import find_spec

# A notebook's commands inherit its backend. Matplotlib can't be imported where that is missing; figures need none.
if os.environ.get("MPLBACKEND", "").startswith("module://matplotlib_inline") and not find_spec("matplotlib_inline"):
    del os.environ["MPLBACKEND"]
