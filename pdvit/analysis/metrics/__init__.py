"""Metrics of patch tokens, in groups: functions here, names and definitions in definitions.toml."""

import tomllib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from torch import Tensor

from pdvit.analysis.metrics.attention import attention_metrics
from pdvit.analysis.metrics.drift import drift_metrics
from pdvit.analysis.metrics.group import Definition, MetricGroup
from pdvit.analysis.metrics.rank import rank_metrics
from pdvit.analysis.metrics.similarity import norm_metrics, pair_metrics
from pdvit.analysis.metrics.spectrum import spectrum_metrics
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


_TABLE = tomllib.loads(files(__name__).joinpath("definitions.toml").read_text(encoding="utf-8"))
METRICS = {
    name: MetricGroup(
        compute,
        {column: Definition(**fields) for column, fields in _TABLE[name]["columns"].items()},
        _TABLE[name].get("curves", {}),
    )
    for name, compute in _COMPUTE.items()
}
DEFAULT = ("similarity", "similarity_signed", "norms")
DEFINITIONS: dict[str, Definition] = {name: text for group in METRICS.values() for name, text in group.columns.items()}
