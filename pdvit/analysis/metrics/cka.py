"""Linear CKA between layers: do two of them tell the images apart in the same way?

CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the Gram matrices K, L of the images, all patches of an image as one
long vector (Kornblith et al. 2019). HSIC is the unbiased estimator of Song et al. 2012, averaged over batches
(Nguyen et al. 2021, arXiv 2010.15327). It is an inner product of matrices, (K~ . L~) / (n (n - 3)), with K~ the
U-centred Gram matrix (Szekely & Rizzo 2014). So HSIC(K, K) is never negative, and CKA stays within [-1, 1]; other ways
to compute the same sum lose that to rounding.
"""

import torch
from torch import Tensor

from pdvit.analysis.metrics.group import ROUNDING, Definition, Group
from pdvit.errors import UserError
from pdvit.similarity import BLOCK_ENTRIES

# The unbiased estimator divides by n - 3.
FEWEST = 4


def centred_gram(tokens: Tensor) -> Tensor:
    """Return the U-centred Gram matrix of a batch of images, `(B, B)`, float64, from their tokens `(B, N, D)`.

    Its sums over rows and columns are 0, its diagonal too. Where the images differ by no more than 1e-6 of the tokens,
    it is 0.

    Raises:
        UserError: fewer than 4 images.
    """
    count = len(tokens)
    if count < FEWEST:
        raise too_few(count)
    gram, energy = _gram(tokens)
    if not bool(gram.diagonal().sum() > ROUNDING**2 * energy):
        return torch.zeros_like(gram)
    gram.fill_diagonal_(0)
    rows = gram.sum(0) / (count - 2)
    centred = gram - rows - rows[:, None] + rows.sum() / (count - 1)
    return centred.fill_diagonal_(0)


def too_few(count: int) -> UserError:
    """Return the error of batches that all are too small."""
    return UserError(
        f"CKA compares images with one another, and {count} at once are too few",
        "analyze(metrics='cka')",
        f"pass batches of at least {FEWEST} images; more make it less noisy (--images, --batch-size)",
    )


def _gram(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix of images centred on their mean, and their squared length before; in parts, in float64."""
    images, _, width = tokens.shape
    gram = tokens.new_zeros(images, images, dtype=torch.float64)
    energy = gram.new_zeros(())
    for part in tokens.split(max(1, BLOCK_ENTRIES // (images * width)), dim=1):
        features = part.flatten(1).double()
        energy += features.square().sum()
        features = features - features.mean(0)  # changes nothing but the rounding
        gram += features @ features.T
    return gram, energy


class LinearCKA:
    """CKA between every layer of one model and every layer of another (or the same), added up over batches."""

    def __init__(self) -> None:
        self.cross: Tensor | float = 0.0
        self.own: Tensor | float = 0.0
        self.other: Tensor | float = 0.0

    def add(self, first: list[Tensor], second: list[Tensor]) -> None:
        """Take in the `centred_gram` of each layer of the one and of the other model, for the same images."""
        one, two = (torch.stack(grams).flatten(1) for grams in (first, second))
        scale = 1 / (len(first[0]) - 3)  # n times HSIC: a batch counts by its images
        self._sum((scale * (one @ two.T)).cpu(), (scale * one.square().sum(1)).cpu(), scale * two.square().sum(1).cpu())

    def merge(self, other: "LinearCKA") -> None:
        """Take in what was added up elsewhere."""
        self._sum(other.cross, other.own, other.other)

    def _sum(self, cross: Tensor | float, own: Tensor | float, other: Tensor | float) -> None:
        self.cross, self.own, self.other = self.cross + cross, self.own + own, self.other + other

    def matrix(self) -> Tensor:
        """Return CKA, `(layers, other layers)`, in [-1, 1]; 0 where a layer does not tell the images apart."""
        assert isinstance(self.own, Tensor)
        assert isinstance(self.other, Tensor)
        scale = self.own.sqrt()[:, None] * self.other.sqrt()
        return (self.cross / scale.where(scale > 0, 1)).clamp(-1, 1).where(scale > 0, 0)


CKA = Group(
    lambda patches: {},
    {
        "cka_last": Definition(
            "linear CKA with the last layer, over images (all patches of an image as one vector), unbiased HSIC "
            "averaged over batches; 0 where a layer does not tell the images apart; one value, so without a spread",
            "-1 to 1; the last layer itself 1",
            "0",
            "as of any others: it compares images",
            "none in HSIC, a little in the ratio for few images; needs batches of 4 or more",
            "Kornblith et al. 2019; Nguyen et al. 2021 (arXiv 2010.15327)",
        )
    },
    {"matrix": "linear CKA between all layers", "layers": "the order of its rows and columns"},
    shown={"cka_last": "CKA last"},
)
