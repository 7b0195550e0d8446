"""The spectral term: the number of directions that the patches of an image use."""

import torch
from torch import Tensor

from pdvit.similarity import unit_tokens


def spectral_loss(last: Tensor) -> Tensor:
    """Return the purity tr(K^2) of K = U U^T / n, averaged over the images; U `(n, d)` holds the patches at length 1.

    K has trace 1, so its eigenvalues sum to 1, and the purity is the sum of their squares; 1 / purity, the
    participation ratio, counts the directions in use. It is also the mean of the squared cosines of all pairs, the
    diagonal included, and up to constants the soft orthogonality |U U^T - I|^2 of Bansal et al., arXiv 1810.09102. Its
    use as a diversity term is our choice. |U U^T| = |U^T U|, so the smaller of the two is computed, and no eigenvalue.

    Args:
        last: patch tokens `(B, N, D)` of the last layer.

    Returns:
        A scalar in [1 / min(n, d), 1]: 1 if all patches are parallel, and for a single patch (without gradient).
        Tokens of length 0 lower it, down to 0. Float32 even under autocast (float64 stays).
    """
    unit = unit_tokens(last)
    count, width = unit.shape[1:]
    across = unit.transpose(1, 2)
    with torch.autocast(unit.device.type, enabled=False):
        gram = unit @ across if count <= width else across @ unit
    return (gram / count).square().sum((1, 2)).mean()
