"""The table of model families: where blocks and final norm of a timm model are, and how its tokens lie."""

from dataclasses import dataclass

from torch import nn

from pdvit.errors import UserError

# Attribute of most plain models: the number of tokens (class, registers) in front of the patches.
COUNT = "num_prefix_tokens"
# Attribute of the model in a wrapper: DiverseModel, those for distribution and averages, torch.compile.
INSIDE = ("model", "module", "_orig_mod")


@dataclass(frozen=True)
class Family:
    """Where a timm model keeps its tokens."""

    blocks: str = "blocks.*"  # path of the blocks, in the order of the forward pass; `*` is every child of a list
    norm: str = "norm"  # path of the norm over all tokens after the last block; can be missing, or an identity
    channels_first: bool = False  # `(B, D, H, W)`; else `(B, N, D)`, prefix tokens in front, or `(B, H, W, D)`
    prefix: str = COUNT  # attribute with the prefix tokens of the blocks or their number; if missing, there are none
    norm_prefix: str = COUNT  # the same for the norm, if class tokens join the patches after the last block
    order: str = ""  # module that brings a block's tokens back into the order of the image
    embed: str = "patch_embed"  # path of the patch embedding
    plain: bool = False  # one grid and width throughout
    # Attribute of a block with attention between all tokens, whose `attn_drop` receives the probabilities; empty if
    # attention works in windows, on merged keys or on channels, or mixes its heads.
    attention: str = ""


PLAIN = Family(plain=True, attention="attn")
STAGES = Family("stages.*.blocks.*")
WINDOWS = Family("layers.*.blocks.*")
MAPS = Family("stages.*.blocks.*", "norm_pre", channels_first=True)
# By class name of the model or of a parent.
FAMILIES = {
    "VisionTransformer": PLAIN,  # ViT, DeiT (also distilled), DeiT-III, DINOv2, SigLIP, CLIP, FlexiViT, hybrids
    "VisionTransformerRelPos": PLAIN,
    "Eva": PLAIN,  # EVA-02, DINOv3
    "Beit": PLAIN,
    "MlpMixer": Family(embed="stem", plain=True),  # also ResMLP and gMLP: patches, no attention
    "Cait": Family(prefix="", plain=True),  # class attention comes after the blocks
    "Xcit": Family(prefix="", plain=True),  # likewise
    "NaFlexVit": Family(embed="", attention="attn"),  # fed with images, not with packed sequences
    "SwinTransformer": WINDOWS,
    "SwinTransformerV2": WINDOWS,
    "SwinTransformerV2Cr": STAGES,
    "PyramidVisionTransformerV2": Family("stages.*.blocks.*", "stages.-1.norm"),
    "MultiScaleVit": STAGES,
    "Twins": Family("blocks.*.*"),
    "VOLO": Family("network.*.*", norm_prefix="cls_token"),
    "PoolingVisionTransformer": Family("transformers.*.blocks.*", "", prefix="cls_token"),
    "Hiera": Family(order="reroll"),
    "HieraDet": Family(),
    "GlobalContextVit": Family("stages.*.blocks.*", "stages.-1.norm"),
    "FocalNet": Family("layers.*.blocks.*", channels_first=True),
    "DaVit": Family("stages.*.blocks.*.*", "norm_pre", channels_first=True),  # spatial and channel attention in turn
    "MaxxVit": Family("stages.*.blocks.*", channels_first=True),  # CoAtNet, MaxViT
    "MetaFormer": MAPS,  # PoolFormer, CAFormer
    "ConvNeXt": MAPS,  # a transformer's block with a convolution for attention: for comparison
}


def family_of(model: nn.Module, where: str = "model.name (--model)") -> Family:
    """Return a timm model's family; raises UserError with the reason if pdvit can't read its tokens."""
    names = [cls.__name__ for cls in type(model).__mro__]
    known = next((name for name in names if name in FAMILIES), None)
    if known is None:
        raise _unsupported(model, names, where)
    drop = getattr(getattr(model, "patch_drop", None), "prob", 0) or getattr(model, "patch_drop_rate", 0)
    if drop > 0:
        what = "patch_drop_rate drops patches at random, so that no patch keeps its place"
        raise UserError(what, where, "build the model with patch_drop_rate=0")
    return FAMILIES[known]


def modules_at(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules at a path of the table, in order, without identities; none if the path does not exist."""
    found: list[nn.Module] = [model]
    for name in filter(None, path.split(".")):
        if name == "*":
            found = [child for part in found if isinstance(part, nn.ModuleList | nn.Sequential) for child in part]
        elif name.lstrip("-").isdigit():
            found = [part[int(name)] for part in found if isinstance(part, nn.ModuleList | nn.Sequential)]
        else:
            found = [child for part in found if isinstance(child := getattr(part, name, None), nn.Module)]
    return [part for part in found if not isinstance(part, nn.Identity)] if path else []


def _unsupported(model: nn.Module, names: list[str], where: str) -> UserError:
    """Return the error of a model without a row: docs/losses.md has the line that the table draws."""
    for attribute in INSIDE:
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and any(cls.__name__ in FAMILIES for cls in type(inner).__mro__):
            tip = f"pass the bare model, which is its .{attribute}"
            return UserError(f"a {names[0]} is a wrapper around the model", where, tip)
    tip = f"use a transformer of timm of these classes: {', '.join(FAMILIES)} (others: docs/losses.md has the reasons)"
    return UserError(f"pdvit can't read the patches of a {names[0]}: it has no layout for its class", where, tip)
