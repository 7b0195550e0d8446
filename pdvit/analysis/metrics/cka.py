"""Linear CKA between layers.

CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the Gram matrices K, L of the images, all patches of an image as one
long vector (Kornblith et al. 2019). HSIC is the unbiased estimator of Song et al. 2012, averaged over batches
(Nguyen et al. 2021, arXiv 2010.15327). It is computed as an inner product of matrices, (K~ . L~) / (n (n - 3)), with K~
the U-centred Gram matrix (Szekely & Rizzo 2014). So HSIC(K, K) is never negative, and CKA stays within [-1, 1]; other
ways to compute the same sum lose that to rounding.
"""

from dataclasses import dataclass
from operator import add

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import ROUNDING
from pdvit.similarity import BLOCK_ENTRIES

MIN_IMAGES = 4  # the unbiased estimator divides by n - 3


def centred_gram(tokens: Tensor) -> Tensor:
    """Return the U-centred Gram matrix of a batch of images, `(B, B)`, float64, from their tokens `(B, N, D)`.

    Its rows and columns sum to 0, its diagonal is 0. If the images differ by no more than 1e-6 of the tokens, it is 0.
    """
    images, _, width = tokens.shape
    gram = tokens.new_zeros(images, images, dtype=torch.float64)
    energy = gram.new_zeros(())
    for part in tokens.split(max(1, BLOCK_ENTRIES // (images * width)), dim=1):
        features = part.flatten(1).double()
        energy += features.square().sum()
        features = features - features.mean(0)  # changes nothing but the rounding
        gram += features @ features.T
    differ = gram.diagonal().sum() > ROUNDING**2 * energy
    gram.fill_diagonal_(0)
    rows = gram.sum(0) / (images - 2)
    centred = gram - rows - rows[:, None] + rows.sum() / (images - 1)
    return centred.fill_diagonal_(0).where(differ, 0)


@dataclass(frozen=True)
class LinearCKA:
    """CKA between every layer of one model and every layer of another (or the same), summed over batches."""

    # n times HSIC of layer pairs, of the layers of the first model and of those of the second
    sums: tuple[Tensor | float, ...] = (0.0, 0.0, 0.0)
    images: int = 0

    @classmethod
    def of(cls, first: list[Tensor], second: list[Tensor]) -> "LinearCKA":
        """Return the sums of a batch, from the `centred_gram` of each layer of both models for the same images."""
        one, two = (torch.stack(grams).flatten(1) for grams in (first, second))
        images, sizes = len(first[0]), [len(one) * len(two), len(one), len(two)]
        values = torch.cat([(one @ two.T).flatten(), one.square().sum(1), two.square().sum(1)])
        cross, *own = (1 / (images - 3) * values).cpu().split(sizes)  # read from the device together
        return cls((cross.view(len(one), len(two)), *own), images)

    def __add__(self, other: "LinearCKA") -> "LinearCKA":
        """Return the sums with those of other images."""
        return LinearCKA(tuple(map(add, self.sums, other.sums)), self.images + other.images)

    def compute(self) -> Tensor:
        """Return CKA, `(layers, other layers)`, in [-1, 1]; 0 for layers that are equal for all images."""
        cross, own, other = (torch.as_tensor(value) for value in self.sums)
        scale = own.sqrt()[:, None] * other.sqrt()
        return (cross / scale.where(scale > 0, 1)).clamp(-1, 1).where(scale > 0, 0)
