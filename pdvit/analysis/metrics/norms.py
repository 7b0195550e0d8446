"""How long the tokens are, and P without those that stand out."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.group import Definition, Group, Patches
from pdvit.analysis.metrics.sample import error_of_share_mean
from pdvit.similarity import SHORTEST, patch_similarity

# Our choice: from twice the median, and five robust standard deviations beyond it, a token is an outlier.
DEVIATIONS = 5
# The median absolute deviation of a normal distribution, times this, is its standard deviation.
NORMAL = 1.4826


def outliers(lengths: Tensor) -> Tensor:
    """Say which tokens are far longer than the rest of their image: lengths `(B, N)` to booleans `(B, N)`.

    Longer than median + max(median, 5 * 1.4826 * median absolute deviation): the first keeps out what only rounding
    sets apart, the second the tail of a wide distribution. At least half of the tokens, and two, are never outliers.
    """
    middle = _median(lengths)
    deviation = NORMAL * _median((lengths - middle).abs())
    return lengths > middle + torch.maximum(middle, DEVIATIONS * deviation)


def similarity_without(tokens: Tensor, left_out: Tensor) -> Tensor:
    """Return P of the tokens `(B, N, D)` that are not `left_out` `(B, N)`, of which there are at least two: `(B,)`."""
    count = tokens.shape[1]
    kept = count - left_out.sum(1)
    # a token of length 0 adds nothing to the sum of |cos|, so only the number of pairs has to be mended
    share = patch_similarity(tokens.masked_fill(left_out[..., None], 0))
    return share * (count * (count - 1) / (kept * (kept - 1)))


def _sampled(patches: Patches, left_out: Tensor) -> dict[str, Tensor]:
    """Do what `similarity_without` does with the sampled pairs that hold no outlier."""
    assert patches.pairs is not None
    kept = ~(left_out[:, patches.pairs[0]] | left_out[:, patches.pairs[1]])
    values = patches.cosines.abs().double()
    name = "similarity_without_outliers"
    return {name: (values * kept).sum(1) / kept.sum(1), f"error/{name}": error_of_share_mean(values, kept)}


def _median(values: Tensor) -> Tensor:
    """Return the median of each row, `(B, 1)`: of an even number the mean of the middle two."""
    ordered = values.sort(-1).values
    count = values.shape[-1]
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2])[:, None] / 2


def _norms(patches: Patches) -> dict[str, Tensor]:
    lengths = patches.lengths
    found = outliers(lengths)
    shortest = lengths.new_tensor(SHORTEST)
    return {
        "norm_mean": lengths.mean(1),
        "norm_std": lengths.std(1),
        "norm_peak": lengths.amax(1).maximum(shortest) / _median(lengths)[:, 0].maximum(shortest),
        "norm_outliers": found.float().mean(1),
    } | _rest(patches, found)


def _rest(patches: Patches, left_out: Tensor) -> dict[str, Tensor]:
    if patches.pairs is not None:
        return _sampled(patches, left_out)
    rest = patches.similarity.clone()
    some = left_out.any(1)
    if bool(some.any()):
        rest[some] = similarity_without(patches.tokens[some], left_out[some])
    return {"similarity_without_outliers": rest}


NORMS = Group(
    _norms,
    {
        "norm_mean": Definition(
            "the mean length of the tokens",
            "0 upwards",
            "about s√d, where s is the spread of an entry",
            "their length",
            "none",
            "Darcet et al. 2024 (arXiv 2309.16588)",
        ),
        "norm_std": Definition(
            "the standard deviation (n - 1) of the lengths over the patches of an image",
            "0 upwards",
            "about s/√2",
            "0",
            "slightly low for few patches",
            "ours",
        ),
        "norm_peak": Definition(
            "the largest length over the median (lengths below 1e-12 count as 1e-12)",
            "1 upwards",
            "just above 1: 1 + √(ln n / d) or so",
            "1",
            "grows with n, as any maximum",
            "ours",
        ),
        "norm_outliers": Definition(
            "the share of tokens longer than median + max(median, 5 * 1.4826 * median absolute deviation)",
            "0 to below ½",
            "0",
            "0",
            "steps of 1/n",
            "our rule; Darcet et al. 2024 choose a number by eye for each model",
        ),
        "similarity_without_outliers": Definition(
            "P of the tokens that are no outliers", "0 to 1", "√(2/πd)", "1", "as P", "ours"
        ),
    },
    shown={
        "norm_mean": "norm",
        "norm_peak": "max/med",
        "norm_outliers": "outliers",
        "similarity_without_outliers": "P w/o",
    },
)
