"""The mixing term: after patch-aligned CutMix, every patch should still tell which image it came from."""

from torch import Tensor
from torch.nn import functional as F

from pdvit.similarity import at_least_float32


def mixing_loss(patch_logits: Tensor, patch_targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the patches: L_mix = 1/n sum_i CE(g(h_i^[L]), y_i), arXiv 2104.12753.

    Args:
        patch_logits: `(B, N, C)`, the shared linear head's answer for each patch of the last layer.
        patch_targets: class of each patch, indices `(B, N)` or probabilities `(B, N, C)`.

    Returns:
        A scalar >= 0, ln C for a head that knows nothing. Float32 even under autocast.
    """
    logits = at_least_float32(patch_logits)
    return F.cross_entropy(logits.flatten(0, 1), patch_targets.flatten(0, 1))
