"""pdvit: see whether a vision transformer's patches collapse, and train ones whose patches don't."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pdvit.analysis import analyze
    from pdvit.data.cutmix import patch_cutmix
    from pdvit.losses import (
        Objective,
        contrastive_loss,
        cosine_loss,
        koleo_loss,
        mixing_loss,
        spectral_loss,
    )
    from pdvit.models.tokens import DiverseModel
    from pdvit.similarity import patch_similarity

# The public names and the modules they live in; torch is imported only when one of them is first used.
_HOMES = {
    "DiverseModel": "pdvit.models.tokens",
    "Objective": "pdvit.losses",
    "analyze": "pdvit.analysis",
    "contrastive_loss": "pdvit.losses",
    "cosine_loss": "pdvit.losses",
    "koleo_loss": "pdvit.losses",
    "mixing_loss": "pdvit.losses",
    "patch_cutmix": "pdvit.data.cutmix",
    "patch_similarity": "pdvit.similarity",
    "spectral_loss": "pdvit.losses",
}
__all__ = [
    "DiverseModel",
    "Objective",
    "analyze",
    "contrastive_loss",
    "cosine_loss",
    "koleo_loss",
    "mixing_loss",
    "patch_cutmix",
    "patch_similarity",
    "spectral_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pdvit' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
