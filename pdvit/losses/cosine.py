"""The cosine term: how alike the patches of the last layer are."""

from torch import Tensor

from pdvit.similarity import patch_similarity


def cosine_loss(last: Tensor) -> Tensor:
    """Return the mean of P over the images: L_cos = P(h^[L]) of arXiv 2104.12753, v3.

    Args:
        last: patch tokens `(B, N, D)` of the last layer, after the final norm.

    Returns:
        A scalar in [0, 1]: 1 where all patches are parallel, 0 for a single patch.
    """
    return patch_similarity(last).mean()
