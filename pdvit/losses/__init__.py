"""The diversity terms, one file each: pure functions of tensors; `objective` adds them up."""

from pdvit.losses.contrastive import contrastive_loss
from pdvit.losses.cosine import cosine_loss
from pdvit.losses.mixing import mixing_loss
from pdvit.losses.objective import TERMS, Losses, Objective

__all__ = ["TERMS", "Losses", "Objective", "contrastive_loss", "cosine_loss", "mixing_loss"]
