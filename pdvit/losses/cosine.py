"""The cosine term: the similarity of the patches of the last layer."""

from torch import Tensor

from pdvit.losses.variants import check_variant
from pdvit.similarity import patch_similarity, unit_tokens


def cosine_loss(last: Tensor, variant: str = "paper") -> Tensor:
    """Return the mean cosine of the patches `(B, N, D)` of an image, averaged over the images.

    With u_i the patches scaled to length 1:

    - `paper`: 1/(n(n-1)) sum over i != j of |u_i . u_j|, that is P(h^[L]) of arXiv 2104.12753, v3.
    - `v1`: the same with its sign, in O(n d).
    - `diverse-vit`: 1/n^2 sum over all i, j of u_i . u_j: signed, the diagonal included (VITA-Group/Diverse-ViT,
      reg.py). It is ((n - 1) v1 + 1) / n, and so never negative.

    The released code of the authors has no cosine term. The value is 1 if all patches are parallel (`paper`) or equal
    (the others); for a single patch 0, and 1 with its diagonal.
    """
    check_variant(variant, ("paper", "v1", "diverse-vit"), "cosine_loss(variant=...)")
    if variant == "diverse-vit":
        return unit_tokens(last).mean(1).square().sum(-1).mean()
    return patch_similarity(last, signed=variant == "v1").mean()
