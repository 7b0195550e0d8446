"""The distance of patches from their own values at the first layer."""

from torch import Tensor

from pdvit.analysis.metrics.group import ROUNDING, Patches
from pdvit.similarity import BLOCK_ENTRIES


def retrieval(unit: Tensor, first: Tensor) -> Tensor:
    """Return the fraction of patches whose nearest patch of the first layer, by cosine, is their own, `(B,)`.

    Patches within 1e-6 of the nearest count as equally near and divide the hit: identical tokens give 1 / N, the
    chance level. Computed in blocks, so memory grows with N * D only.
    """
    images, count, _ = unit.shape
    rows = max(1, min(count, BLOCK_ENTRIES // max(1, images * count)))
    hits = unit.new_zeros(images)
    for start in range(0, count, rows):
        cosines = unit[:, start : start + rows] @ first.transpose(1, 2)
        nearest = cosines >= cosines.amax(-1, keepdim=True) - ROUNDING
        own = nearest.diagonal(offset=start, dim1=1, dim2=2)
        hits += (own / nearest.sum(-1)).sum(-1)
    return hits / count


def drift_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of drift; none if this layer can't be compared with the first."""
    unit, first = patches.unit, patches.first
    if first is None:
        return {}
    return {"drift_cosine": (unit * first).sum(-1).mean(-1), "drift_retrieval": retrieval(unit, first)}
