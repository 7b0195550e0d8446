"""How far patches are from what they were at the first layer."""

from torch import Tensor

from pdvit.analysis.metrics.group import ROUNDING, Definition, Group, Patches
from pdvit.similarity import BLOCK_ENTRIES


def own_cosine(unit: Tensor, first: Tensor) -> Tensor:
    """Return the mean over patches of cos(h_i, h_i of the first layer), `(B,)`, from tokens `(B, N, D)` of length 1."""
    return (unit * first).sum(-1).mean(-1)


def retrieval(unit: Tensor, first: Tensor) -> Tensor:
    """Return the share of patches whose nearest patch of the first layer, by cosine, is their own, `(B,)`.

    Patches within 1e-6 of the nearest are as near as it, and share the hit: of identical tokens each finds itself with
    1 / N, as by chance. Made in blocks, so that memory grows with N * D only.
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


def _drift(patches: Patches) -> dict[str, Tensor]:
    if patches.first is None:
        return {}
    found = retrieval(patches.unit, patches.first)
    return {"drift_cosine": own_cosine(patches.unit, patches.first), "drift_retrieval": found}


DRIFT = Group(
    _drift,
    {
        "drift_cosine": Definition(
            "the mean over patches of cos(h_i, its own patch at the first layer)",
            "-1 to 1",
            "0",
            "±1 (the cosine of the two tokens)",
            "none",
            "the positive pair of the contrastive term of Gong et al. 2021",
        ),
        "drift_retrieval": Definition(
            "the share of patches whose nearest patch at the first layer, by cosine, is their own; those within "
            "1e-6 of the nearest share the hit",
            "0 to 1",
            "1/n",
            "1/n",
            "chance is 1/n, so it reads higher on fewer patches",
            "ours",
        ),
    },
    shown={"drift_cosine": "own", "drift_retrieval": "found"},
)
