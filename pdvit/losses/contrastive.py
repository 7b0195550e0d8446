"""The contrastive term: a patch of the last layer should know its own patch of the first layer."""

from torch import Tensor
from torch.nn import functional as F

from pdvit.similarity import at_least_float32


def contrastive_loss(first: Tensor, last: Tensor, detach_first: bool = True) -> Tensor:
    """Return L_con of arXiv 2104.12753, v3, averaged over patches and images.

    -log( exp(f_i . l_i) / (exp(f_i . l_i) + exp(f_i . m_i)) ), where f and l are the first and last layer's patches and
    m_i is the mean of the other patches of the last layer. That is softplus(f_i . (m_i - l_i)), the form computed here.

    Args:
        first: patch tokens `(B, N, D)` of the first layer.
        last: patch tokens `(B, N, D)` of the last layer, after the final norm.
        detach_first: stop the gradient at the first layer (our choice, and that of the authors' code).

    Returns:
        A scalar >= 0: ln 2 where all last patches are equal, 0 for a single patch. The products are raw, so it has no
        upper bound. Float32 even under autocast (float64 tokens stay float64).
    """
    count = last.shape[1]
    if detach_first:
        first = first.detach()
    first, last = at_least_float32(first), at_least_float32(last)
    if count < 2:
        return (last * 0).sum() + (first * 0).sum()
    # m_i - l_i = (sum_j l_j - n l_i) / (n - 1) = n / (n - 1) * (mean - l_i): elementwise, so autocast leaves it alone
    away = (last.mean(1, keepdim=True) - last) * (count / (count - 1))
    return F.softplus((first * away).sum(-1)).mean()
