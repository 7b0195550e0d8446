"""What happens to the patches of a checkpoint, layer by layer."""

from pdvit.analysis.between import cka_between
from pdvit.analysis.measure import Analysis, analyze, measure
from pdvit.analysis.metrics import DEFAULT, DEFINITIONS, METRICS
from pdvit.analysis.report import statement, write_analysis
from pdvit.analysis.verdict import COLLAPSED, onset, verdict

__all__ = [
    "COLLAPSED",
    "DEFAULT",
    "DEFINITIONS",
    "METRICS",
    "Analysis",
    "analyze",
    "cka_between",
    "measure",
    "onset",
    "statement",
    "verdict",
    "write_analysis",
]
