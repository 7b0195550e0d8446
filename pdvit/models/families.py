"""The tables of model families: where blocks and final norm of a model are, and how its tokens lie."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import nn

from pdvit.errors import UserError

# Class, distillation and register tokens of timm.
TOKENS = r"(?:embeds\.)?(?:cls|dist|reg)_token"


@dataclass(frozen=True)
class Family:
    """Where a model keeps its tokens: regular expressions for the names of its modules and parameters."""

    blocks: str | tuple[nn.Module, ...] = r"blocks\.\d+"  # in the order of the forward pass
    norm: str = "norm"  # over all tokens after the last block; can be missing, or an identity
    # `(B, D, H, W)`; else `(B, N, D)`, prefix tokens in front, or `(B, H, W, D)`, which None excludes.
    channels_first: bool | None = False
    prefix: str | int = TOKENS  # parameters `(1, K, D)` or `(D,)` of the blocks' prefix tokens, or their number
    norm_prefix: str | int | None = None  # of the norm, if class tokens join the patches after the last block
    order: str = ""  # module that brings a block's tokens back into the order of the image
    embed: str = "patch_embed"  # the patch embedding
    plain: bool = False  # one grid and width throughout
    # Attribute of a block with attention between all tokens, whose `attn_drop` receives the probabilities; empty if
    # attention works in windows, on merged keys or on channels, or mixes its heads.
    attention: str = ""


PLAIN = Family(plain=True, attention="attn")
STAGES = Family(r"stages\.\d+\.blocks\.\d+")
WINDOWS = Family(r"layers\.\d+\.blocks\.\d+")
MAPS = replace(STAGES, norm="norm_pre", channels_first=True)
NORM_OF_STAGE = replace(STAGES, norm=r"stages\.\d+\.norm")  # the last
# By class name of the timm model or of a parent.
FAMILIES = {
    "VisionTransformer": PLAIN,  # ViT, DeiT (also distilled), DeiT-III, DINOv2, SigLIP, CLIP, FlexiViT, hybrids
    "VisionTransformerRelPos": PLAIN,
    "Eva": PLAIN,  # EVA-02, DINOv3
    "Beit": PLAIN,
    "MlpMixer": Family(embed="stem", plain=True),  # also ResMLP and gMLP: patches, no attention
    "Cait": Family(prefix=0, norm_prefix=TOKENS, plain=True),  # class attention comes after the blocks
    "Xcit": Family(prefix=0, norm_prefix=TOKENS, plain=True),  # likewise
    "NaFlexVit": Family(embed="", attention="attn"),  # fed with images, not with packed sequences
    "SwinTransformer": WINDOWS,
    "SwinTransformerV2": WINDOWS,
    "SwinTransformerV2Cr": STAGES,
    "PyramidVisionTransformerV2": NORM_OF_STAGE,
    "MultiScaleVit": STAGES,
    "Twins": Family(r"blocks\.\d+\.\d+"),
    "VOLO": Family(r"network\.\d+\.\d+", prefix=0, norm_prefix=TOKENS),
    "PoolingVisionTransformer": Family(r"transformers\.\d+\.blocks\.\d+", ""),
    "Hiera": Family(order="reroll"),
    "HieraDet": Family(),
    "GlobalContextVit": NORM_OF_STAGE,
    "FocalNet": replace(WINDOWS, channels_first=True),
    "DaVit": replace(MAPS, blocks=r"stages\.\d+\.blocks\.\d+\.\d+"),  # spatial and channel attention in turn
    "MaxxVit": replace(STAGES, channels_first=True),  # CoAtNet, MaxViT
    "MetaFormer": MAPS,  # PoolFormer, CAFormer
    "ConvNeXt": MAPS,  # a transformer's block with a convolution for attention: for comparison
}

TRANSFORMERS = Family(
    r"(?:model\.|encoder\.|vision_model\.encoder\.)?layers?\.\d+",  # versions differ
    r"layernorm|norm|(?:vision_model\.)?post_layernorm",
    prefix=r"(?:vision_model\.)?embeddings\.(?:cls_token|distillation_token|register_tokens|class_embedding)",
)
SWIN = Family(r"encoder\.layers\.\d+\.blocks\.\d+", "layernorm", prefix=0)
OPEN_CLIP = Family(r"transformer\.resblocks\.\d+", "ln_post", prefix="class_embedding")
PLAIN_TRANSFORMERS = (
    *("ViT", "DeiT", "Beit", "Data2VecVision", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "ViTMSN", "IJepa"),
    "SiglipVision",
)
BACKBONES = ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT")
# By package and class name of the model or of a parent. The packages are never imported.
OTHER_LIBRARIES = {f"transformers.{name}Model": TRANSFORMERS for name in PLAIN_TRANSFORMERS} | {
    # the norm is over the class token alone
    "transformers.CLIPVisionModel": replace(TRANSFORMERS, norm=""),
    # a backbone norms the maps that it returns, some or all
    **{f"transformers.{name}Backbone": replace(TRANSFORMERS, norm="") for name in BACKBONES},
    "transformers.Swinv2Backbone": replace(SWIN, norm=""),
    "transformers.SwinModel": SWIN,
    "transformers.Swinv2Model": SWIN,
    "torchvision.VisionTransformer": Family(r"encoder\.layers\.\w+", r"encoder\.ln", prefix="class_token"),
    "torchvision.SwinTransformer": Family(r"features\.[1357]\.\d+", prefix=0),
    "open_clip.VisionTransformer": OPEN_CLIP,
}
# Models that can't be read in memory: the reason, and what to do.
REFUSED = {
    "transformers.ViTMAEModel": ("it shuffles patches, also in evaluation mode", "load its weights as a ViTModel"),
    "transformers.Siglip2VisionModel": ("it takes packed patches", "use SigLIP 2 of a fixed size, a SiglipVisionModel"),
}
TABLE = {f"timm.{name}": family for name, family in FAMILIES.items()} | OTHER_LIBRARIES | REFUSED
OTHER_MODEL = (
    "use a model that docs/losses.md lists, no convolutional network; or, in Python, name the blocks, prefix tokens "
    "and norm of another transformer: blocks='encoder.layers', prefix_tokens=1, norm='encoder.ln'"
)
# By package, the attributes with the model inside wrappers, and with the image model inside classifiers and CLIP.
WRAPPERS = {"torch": ("_orig_mod", "module"), "timm": ("module",), "pdvit": ("model", "backbone")}
INSIDE = WRAPPERS | {
    "peft": ("base_model", "model"),
    "transformers": ("vision_model", "timm_model", "base_model"),
    "open_clip": ("visual", "trunk"),
}


def image_model_of(model: nn.Module, packages: Collection[str] = INSIDE.keys()) -> nn.Module:
    """Return the model of the table inside wrappers and models of some packages; if none is, the innermost model."""
    names = _names(model)
    if not any(name in TABLE for name in names):
        for package in [package for name in names if (package := name.partition(".")[0]) in packages]:
            for inner in (getattr(model, attribute, None) for attribute in INSIDE[package]):
                if isinstance(inner, nn.Module) and inner is not model:
                    return image_model_of(inner, packages)
    return model


def family_of(model: nn.Module, where: str = "model.name (--model)") -> Family:
    """Return a model's family; raises UserError with the reason if pdvit can't read its tokens."""
    family = next((TABLE[name] for name in _names(model) if name in TABLE), None)
    if not isinstance(family, Family):
        reason, tip = family or ("it has no layout for its class", OTHER_MODEL)
        raise UserError(f"pdvit can't read the patches of a {type(model).__name__}: {reason}", where, tip)
    drops = (getattr(getattr(model, name, None), "prob", 0) for name in ("patch_drop", "patch_dropout"))
    if max(*drops, getattr(model, "patch_drop_rate", 0)) > 0:
        what = "patch_drop_rate drops patches at random, so that no patch keeps its place"
        raise UserError(what, where, "build the model with patch_drop_rate=0")
    if family is OPEN_CLIP and (getattr(model, "final_ln_after_pool", False) or getattr(model, "attn_pool", None)):
        return replace(family, norm="")  # it is over pooled tokens
    return family


def modules_at(model: nn.Module, names: str | tuple[nn.Module, ...]) -> list[nn.Module]:
    """Return the modules one of whose names matches a regular expression, in order, without identities."""
    if isinstance(names, str):
        named = model.named_modules(remove_duplicate=False)
        names = tuple(dict.fromkeys(module for name, module in named if name and re.fullmatch(names, name)))
    return [module for module in names if not isinstance(module, nn.Identity)]


def _names(model: object) -> list[str]:
    """Return package and name of a model's classes; a module of torch's own base class is no wrapper of torch."""
    classes = [cls for cls in type(model).__mro__ if cls not in (nn.Module, object)]
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in classes]
