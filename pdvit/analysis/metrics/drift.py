"""The distance of patches from their own values at the first layer."""

from torch import Tensor

from pdvit.analysis.metrics.group import ROUNDING, Patches
from pdvit.similarity import row_blocks


def drift_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of drift; none if this layer can't be compared with the first.

    Retrieval is the fraction of patches whose nearest patch of the first layer, by cosine, is their own. Patches within
    1e-6 of the nearest count as equally near and divide the hit: identical tokens give 1 / N, the chance level.
    """
    unit, first = patches.unit, patches.first
    if first is None:
        return {}
    hits = unit.new_zeros(len(unit))
    for rows in row_blocks(unit):
        cosines = unit[:, rows] @ first.transpose(1, 2)
        nearest = cosines >= cosines.amax(-1, keepdim=True) - ROUNDING
        own = nearest.diagonal(offset=rows.start, dim1=1, dim2=2)
        hits += (own / nearest.sum(-1)).sum(-1)
    return {"drift_cosine": (unit * first).sum(-1).mean(-1), "drift_retrieval": hits / unit.shape[1]}
