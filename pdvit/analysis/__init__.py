"""What happens to the patches of a checkpoint, layer by layer."""

from pdvit.analysis.measure import METRICS, analyze
from pdvit.analysis.report import statement, write_analysis
from pdvit.analysis.verdict import COLLAPSED, onset, verdict

__all__ = ["COLLAPSED", "METRICS", "analyze", "onset", "statement", "verdict", "write_analysis"]
