"""Metrics of patch tokens: a new group is a function here, its row in `_COMPUTE`, and its texts in definitions.toml."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pdvit.analysis.metrics.attention import attention_metrics
from pdvit.analysis.metrics.drift import drift_metrics
from pdvit.analysis.metrics.group import MetricGroup
from pdvit.analysis.metrics.rank import rank_metrics
from pdvit.analysis.metrics.similarity import norm_metrics, pair_metrics
from pdvit.analysis.metrics.spectrum import spectrum_metrics
from pdvit.definitions import DEFINITIONS, GROUPS
from pdvit.similarity import patch_similarity

_COMPUTE: dict[str, Callable[[Any], dict[str, Tensor]]] = {
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

METRICS = {
    name: MetricGroup(
        _COMPUTE[name], {column: DEFINITIONS[column] for column in group["columns"]}, group.get("curves", {})
    )
    for name, group in GROUPS.items()
}
