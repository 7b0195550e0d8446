"""Analysis of the patches of a checkpoint, layer by layer."""

from pdvit.analysis.measure import Analysis, analyze, cka_between, measure
from pdvit.analysis.metrics import DEFAULT, DEFINITIONS, METRICS
from pdvit.analysis.tables import write_analysis, write_between
from pdvit.analysis.verdict import describe

__all__ = [
    "DEFAULT",
    "DEFINITIONS",
    "METRICS",
    "Analysis",
    "analyze",
    "cka_between",
    "describe",
    "measure",
    "write_analysis",
    "write_between",
]
