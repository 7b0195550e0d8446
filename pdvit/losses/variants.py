"""The variants of the terms: the paper's versions, its released code, and a reimplementation."""

from collections.abc import Sequence

from pdvit.errors import UserError, closest

# paper: arXiv 2104.12753 v3; v1: its first version; released: ChengyueGongR/PatchVisionTransformer at b70ee23;
# diverse-vit: VITA-Group/Diverse-ViT, reg.py. docs/losses.md has them side by side.
VARIANTS = ("paper", "v1", "released", "diverse-vit")


def check_variant(variant: str, known: Sequence[str], where: str) -> None:
    """Raise UserError if a term has no variant of this name."""
    if variant not in known:
        tip = closest(variant, known)
        if variant in VARIANTS:
            tip = f"choose from {', '.join(known)}, or leave the term off"
        raise UserError(f"there is no variant '{variant}' here", where, tip)
