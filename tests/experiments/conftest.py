import sys
from pathlib import Path

# The scripts there import one another as scripts do.
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
