"""What others measured of a model that is known by name: only what a source says, with that source."""

# timm's name without a tag, number of blocks, and what is known. All else that papers show is in figures.
PUBLISHED = (
    (
        "deit_base_patch16_224",
        24,
        "P above 0.7 at the last layer (arXiv 2104.12753 v3, as told by a later article; those weights are not public)",
    ),
    (
        "vit_base_patch32_224",
        12,
        "P of 0.54 at block 1, lowest (0.21) at block 7, 0.22 at block 12, before the norm (one reader of "
        "the same paper, one image, timm's weights of that time: ChengyueGongR/PatchVisionTransformer, issue 3)",
    ),
)


def published(architecture: str, blocks: int) -> str | None:
    """Return what is known of timm's model of that name with so many blocks; None for nothing."""
    name = architecture.partition(".")[0]
    return next((text for known, depth, text in PUBLISHED if (known, depth) == (name, blocks)), None)
