"""The diversity terms: pure functions of tensors; `objective` adds them up."""

from pdvit.losses.contrastive import contrastive_loss
from pdvit.losses.cosine import cosine_loss
from pdvit.losses.mixing import mixing_loss
from pdvit.losses.objective import Objective
from pdvit.losses.schedule import WeightSchedule
from pdvit.losses.terms import TERMS, koleo_loss, spectral_loss
from pdvit.losses.variants import VARIANTS

__all__ = [
    "TERMS",
    "VARIANTS",
    "Objective",
    "WeightSchedule",
    "contrastive_loss",
    "cosine_loss",
    "koleo_loss",
    "mixing_loss",
    "spectral_loss",
]
