"""The presets: weights and forms of the terms by one name."""

from dataclasses import dataclass

TERMS = ("cosine", "contrastive", "mixing", "koleo", "spectral")
VARIANTS = ("paper", "v1", "released", "diverse-vit")


@dataclass(frozen=True)
class Preset:
    """What a preset says where the user says nothing.

    Attributes:
        variant: form of the cosine, contrastive and mixing terms.
        cosine, contrastive, mixing, koleo, spectral: weights.
        first, last, patch_head: which tokens the terms read, and which head the mixing term has.
        mixed: mix the images even without the mixing term.
    """

    variant: str = "paper"
    cosine: float = 0.0
    contrastive: float = 0.0
    mixing: float = 0.0
    koleo: float = 0.0
    spectral: float = 0.0
    first: str = "block"
    last: str = "norm"
    patch_head: str = "own"
    mixed: bool = False


# Where the weights come from stands in docs/losses.md.
PRESETS = {
    "paper": Preset(cosine=1.0, contrastive=1.0, mixing=1.0),
    "v1": Preset("v1", cosine=1.0, contrastive=1.0, mixing=1.0),
    "released": Preset("released", contrastive=1.0, mixing=1.0, first="patches"),
    "diverse-vit": Preset(
        "diverse-vit", cosine=0.5, contrastive=0.5, mixing=1.0, first="embed", last="block", patch_head="class"
    ),
    "koleo": Preset(koleo=1.0),
    "spectral": Preset(spectral=1.0),
    "cutmix": Preset(mixed=True),
    "none": Preset(),
}
