"""The one table of model families: where the blocks and the final norm of each are."""

from dataclasses import dataclass

from torch import nn

from pdvit.errors import UserError


@dataclass(frozen=True)
class Family:
    """Attribute names of a timm model: its blocks, and the norm over all tokens after the last of them."""

    blocks: str = "blocks"
    norm: str = "norm"


# By class name of the model or of a parent; all of these keep one grid and one width from the first block to the last.
FAMILIES = {
    "VisionTransformer": Family(),  # ViT, DeiT (also distilled), DeiT-III, DINOv2, SigLIP, CLIP, FlexiViT, hybrids
    "VisionTransformerRelPos": Family(),
    "Eva": Family(),  # EVA-02, DINOv3
    "Beit": Family(),
}


def family_of(model: nn.Module, where: str = "model.name (--model)") -> Family:
    """Look up a timm model's family; UserError with the reason where pdvit can't read its tokens."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            break
    else:
        raise UserError(
            f"pdvit can't read the patches of a {type(model).__name__}",
            where,
            f"use a plain vision transformer of timm: {', '.join(FAMILIES)}",
        )
    drop = getattr(model, "patch_drop", None)
    if getattr(drop, "prob", 0) > 0:
        raise UserError(
            "patch_drop_rate throws patches away at random, so that no patch keeps its place",
            where,
            "build the model with patch_drop_rate=0",
        )
    return FAMILIES[cls.__name__]
