"""Analysis of the patches of a checkpoint, layer by layer."""

from pdvit.analysis.measure import Analysis, cka_between, measure
from pdvit.analysis.metrics import METRICS
from pdvit.analysis.tables import write_analysis, write_between

__all__ = ["METRICS", "Analysis", "cka_between", "measure", "write_analysis", "write_between"]
