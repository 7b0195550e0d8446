import sys
from pathlib import Path

# The scripts there import one another as scripts do.
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS / name) for name in ("", "ablation", "depth", "speed")]
