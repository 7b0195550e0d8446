"""What happens to the patches of a checkpoint, layer by layer."""

from pdvit.analysis.between import cka_between
from pdvit.analysis.measure import Analysis, analyze, measure
from pdvit.analysis.metrics import DEFAULT, DEFINITIONS, METRICS
from pdvit.analysis.published import published
from pdvit.analysis.report import statement, with_random, write_analysis, write_between

__all__ = [
    "DEFAULT",
    "DEFINITIONS",
    "METRICS",
    "Analysis",
    "analyze",
    "cka_between",
    "measure",
    "published",
    "statement",
    "with_random",
    "write_analysis",
    "write_between",
]
