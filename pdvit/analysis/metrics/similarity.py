"""How alike the patches of an image are: P, and its signed form."""

from pdvit.analysis.metrics.group import Definition, Group
from pdvit.similarity import patch_similarity

ABSOLUTE = Group(
    lambda patches: {"similarity": patches.similarity},
    {
        "similarity": Definition(
            "P, the mean of |cos| over all pairs of different patches of an image",
            "0 to 1",
            "√(2/πd)",
            "1",
            "none in n; but its floor is above 0 where n > d (Welch's bound, below)",
            "Gong et al. 2021 (arXiv 2104.12753 v3)",
        )
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
