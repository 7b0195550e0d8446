"""Metrics of patch tokens by group: a function here, and the texts of its columns and curves in definitions.toml."""

from collections.abc import Callable

from torch import Tensor

from pdvit.analysis.metrics.attention import attention_metrics
from pdvit.analysis.metrics.rank import rank_metrics
from pdvit.analysis.metrics.similarity import drift_metrics, norm_metrics, pair_metrics
from pdvit.analysis.metrics.spectrum import spectrum_metrics
from pdvit.similarity import patch_similarity

# Each maps `Patches` (`attention` its matrices) to named values: one per image, `(B,)`, for a column of the table, or a
# curve per image, `(B, K)`, whose mean over images goes to a file.
METRICS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "similarity": lambda patches: {"similarity": patches.similarity},
    "similarity_signed": lambda patches: {"similarity_signed": patch_similarity(patches.tokens, signed=True)},
    "norms": norm_metrics,
    "pairs": pair_metrics,
    "drift": drift_metrics,
    "rank": rank_metrics,
    "spectrum": spectrum_metrics,
    "attention": attention_metrics,
    "cka": lambda patches: {},  # of all images of a batch at once: LinearCKA
}
