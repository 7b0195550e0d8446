"""How alike the patches of an image are: P, and its signed form."""

from torch import Tensor

from pdvit.analysis.metrics.group import Definition, Group, Patches
from pdvit.analysis.metrics.sample import error_of_mean
from pdvit.similarity import patch_similarity


def _absolute(patches: Patches) -> dict[str, Tensor]:
    found = {"similarity": patches.similarity}
    return found if patches.pairs is None else found | {"error/similarity": error_of_mean(patches.cosines.abs())}


ABSOLUTE = Group(
    _absolute,
    {
        "similarity": Definition(
            "P, the mean of |cos| over all pairs of different patches of an image",
            "0 to 1",
            "√(2/πd)",
            "1",
            "none in n; but its floor is above 0 where n > d (Welch's bound, below)",
            "Gong et al. 2021 (arXiv 2104.12753 v3)",
        ),
        "similarity_random": Definition(
            "P of the same model with random weights (timm's own initialisation, seed 0), on at most 32 of the same "
            "images; of the command only",
            "0 to 1",
            "√(2/πd)",
            "1",
            "as P; one draw of the weights",
            "ours",
        ),
    },
    shown={"similarity": "P"},
)


SIGNED = Group(
    lambda patches: {"similarity_signed": patch_similarity(patches.tokens, signed=True)},
    {
        "similarity_signed": Definition(
            "the mean of cos over all pairs of different patches of an image",
            "-1/(n-1) to 1",
            "0",
            "1",
            "none",
            "v1 of the same paper",
        )
    },
    shown={"similarity_signed": "signed"},
)
