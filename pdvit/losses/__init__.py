"""The diversity terms: pure functions of tensors; `objective` adds them up."""

from pdvit.config.schema import TERMS
from pdvit.losses.contrastive import contrastive_loss
from pdvit.losses.gram import gram_loss
from pdvit.losses.mixing import mixing_loss
from pdvit.losses.objective import Objective
from pdvit.losses.terms import cosine_loss, koleo_loss, spectral_loss

__all__ = [
    "TERMS",
    "Objective",
    "contrastive_loss",
    "cosine_loss",
    "gram_loss",
    "koleo_loss",
    "mixing_loss",
    "spectral_loss",
]
