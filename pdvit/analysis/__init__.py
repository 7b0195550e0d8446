"""What happens to the patches of a checkpoint, layer by layer."""

from pdvit.analysis.between import cka_between
from pdvit.analysis.measure import Analysis, analyze, measure
from pdvit.analysis.metrics import DEFAULT, DEFINITIONS, METRICS
from pdvit.analysis.published import published
from pdvit.analysis.report import statement, with_random, write_analysis, write_between
from pdvit.analysis.verdict import COLLAPSED, LEAST, advice, climb, onset, verdict

__all__ = [
    "COLLAPSED",
    "DEFAULT",
    "DEFINITIONS",
    "LEAST",
    "METRICS",
    "Analysis",
    "advice",
    "analyze",
    "cka_between",
    "climb",
    "measure",
    "onset",
    "published",
    "statement",
    "verdict",
    "with_random",
    "write_analysis",
    "write_between",
]
