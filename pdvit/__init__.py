"""pdvit: see whether a vision transformer's patches collapse, and train ones whose patches don't."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pdvit.version import __version__ as __version__

if TYPE_CHECKING:
    from pdvit import plots as plots
    from pdvit.data.mixing import patch_cutmix
    from pdvit.losses import Objective, contrastive_loss, cosine_loss, gram_loss, koleo_loss, mixing_loss, spectral_loss
    from pdvit.models.tokens import DiverseModel
    from pdvit.similarity import patch_similarity
    from pdvit.workflows.library import analyze, explore, load, token_maps, train

# The modules of the public names; torch is imported only when one of them is first used.
_MODULES = {
    "DiverseModel": "pdvit.models.tokens",
    "patch_cutmix": "pdvit.data.mixing",
    "patch_similarity": "pdvit.similarity",
    **dict.fromkeys(("analyze", "explore", "load", "token_maps", "train"), "pdvit.workflows.library"),
}
__all__ = [
    "DiverseModel",
    "Objective",
    "analyze",
    "contrastive_loss",
    "cosine_loss",
    "explore",
    "gram_loss",
    "koleo_loss",
    "load",
    "mixing_loss",
    "patch_cutmix",
    "patch_similarity",
    "spectral_loss",
    "token_maps",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module("pdvit.plots")
    if name not in __all__:
        raise AttributeError(f"module 'pdvit' has no attribute '{name}'")
    return getattr(import_module(_MODULES.get(name, "pdvit.losses")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
