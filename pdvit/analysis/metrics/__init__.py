"""The metrics of the patches, in groups; each file has the functions of one."""

from pdvit.analysis.metrics.attention import ATTENTION, Attention
from pdvit.analysis.metrics.cka import CKA, LinearCKA, centred_gram
from pdvit.analysis.metrics.drift import DRIFT
from pdvit.analysis.metrics.group import Definition, Group, Patches
from pdvit.analysis.metrics.norms import NORMS
from pdvit.analysis.metrics.pairs import PAIRS
from pdvit.analysis.metrics.rank import RANK
from pdvit.analysis.metrics.similarity import ABSOLUTE, SIGNED
from pdvit.analysis.metrics.spectrum import SPECTRUM

METRICS = {
    "similarity": ABSOLUTE,
    "similarity_signed": SIGNED,
    "norms": NORMS,
    "pairs": PAIRS,
    "drift": DRIFT,
    "rank": RANK,
    "spectrum": SPECTRUM,
    "attention": ATTENTION,
    "cka": CKA,
}
DEFAULT = ("similarity", "similarity_signed", "norms")
# What each number of the table means.
DEFINITIONS: dict[str, Definition] = {name: text for group in METRICS.values() for name, text in group.columns.items()}

__all__ = [
    "DEFAULT",
    "DEFINITIONS",
    "METRICS",
    "Attention",
    "Definition",
    "Group",
    "LinearCKA",
    "Patches",
    "centred_gram",
]
