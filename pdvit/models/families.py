"""The tables of model families: where blocks and final norm of a model are, and how its tokens lie."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import Tensor, nn

from pdvit.errors import UserError, closest

# Attribute of most plain models: the number of tokens (class, registers) in front of the patches.
COUNT = "num_prefix_tokens"
LISTS = nn.ModuleList | nn.Sequential
# Modules, or their paths, separated by commas; `*` is every child of a list.
Modules = str | tuple[nn.Module, ...]


@dataclass(frozen=True)
class Family:
    """Where a model keeps its tokens."""

    blocks: Modules = "blocks.*"  # in the order of the forward pass
    norm: Modules = "norm"  # over all tokens after the last block; can be missing, or an identity
    # `(B, D, H, W)`; else `(B, N, D)`, prefix tokens in front, or `(B, H, W, D)`, which None excludes.
    channels_first: bool | None = False
    prefix: str | int = COUNT  # of the blocks: the number of prefix tokens, or attributes for `count_prefix`
    norm_prefix: str | int | None = None  # of the norm, if class tokens join the patches after the last block
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
# By class name of the timm model or of a parent.
FAMILIES = {
    "VisionTransformer": PLAIN,  # ViT, DeiT (also distilled), DeiT-III, DINOv2, SigLIP, CLIP, FlexiViT, hybrids
    "VisionTransformerRelPos": PLAIN,
    "Eva": PLAIN,  # EVA-02, DINOv3
    "Beit": PLAIN,
    "MlpMixer": Family(embed="stem", plain=True),  # also ResMLP and gMLP: patches, no attention
    "Cait": Family(prefix=0, norm_prefix=COUNT, plain=True),  # class attention comes after the blocks
    "Xcit": Family(prefix=0, norm_prefix=COUNT, plain=True),  # likewise
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

TRANSFORMERS = Family(
    "layers.*,layer.*,encoder.layer.*,encoder.layers.*,model.layer.*,vision_model.encoder.layers.*",  # versions differ
    "layernorm,norm,post_layernorm,vision_model.post_layernorm",
    prefix="embeddings.cls_token,embeddings.distillation_token,embeddings.register_tokens",
)
CLASS_OF_CLIP = "embeddings.class_embedding,vision_model.embeddings.class_embedding"
SWIN = Family("encoder.layers.*.blocks.*", "layernorm", prefix=0)
OPEN_CLIP = Family("transformer.resblocks.*", "ln_post", prefix="class_embedding")
PLAIN_TRANSFORMERS = (
    *("ViT", "DeiT", "Beit", "Data2VecVision", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "ViTMSN", "IJepa"),
    "SiglipVision",
)
# By package and class name of the model or of a parent. The packages are never imported.
OTHER_LIBRARIES = {f"transformers.{name}Model": TRANSFORMERS for name in PLAIN_TRANSFORMERS} | {
    # the norm is over the class token alone
    "transformers.CLIPVisionModel": replace(TRANSFORMERS, norm="", prefix=CLASS_OF_CLIP),
    "transformers.SwinModel": SWIN,
    "transformers.Swinv2Model": SWIN,
    "torchvision.VisionTransformer": Family("encoder.layers.*", "encoder.ln", prefix="class_token"),
    "torchvision.SwinTransformer": Family("features.1.*,features.3.*,features.5.*,features.7.*", prefix=0),
    "open_clip.VisionTransformer": OPEN_CLIP,
}
# Models that can't be read in memory: the reason, and what to do.
REFUSED = {
    "transformers.ViTMAEModel": ("it shuffles patches, also in evaluation mode", "load its weights as a ViTModel"),
    "transformers.Siglip2VisionModel": ("it takes packed patches", "use SigLIP 2 of a fixed size, a SiglipVisionModel"),
}
TABLE = {f"timm.{name}": family for name, family in FAMILIES.items()} | OTHER_LIBRARIES
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
    if not any(name in TABLE or name in REFUSED for name in names):
        for package in [package for name in names if (package := name.partition(".")[0]) in packages]:
            for inner in (getattr(model, attribute, None) for attribute in INSIDE[package]):
                if isinstance(inner, nn.Module) and inner is not model:
                    return image_model_of(inner, packages)
    return model


def family_of(model: nn.Module, where: str = "model.name (--model)") -> Family:
    """Return a model's family; raises UserError with the reason if pdvit can't read its tokens."""
    names = _names(model)
    family = next((TABLE[name] for name in names if name in TABLE), None)
    if family is None:
        tip = "use a model that docs/losses.md lists; or, in Python, name the blocks: blocks='encoder.layers'"
        reasons = [REFUSED[name] for name in names if name in REFUSED]
        reason, tip = reasons[0] if reasons else ("it has no layout for its class", tip)
        raise UserError(f"pdvit can't read the patches of a {type(model).__name__}: {reason}", where, tip)
    drops = (getattr(getattr(model, name, None), "prob", 0) for name in ("patch_drop", "patch_dropout"))
    if max(*drops, getattr(model, "patch_drop_rate", 0)) > 0:
        what = "patch_drop_rate drops patches at random, so that no patch keeps its place"
        raise UserError(what, where, "build the model with patch_drop_rate=0")
    if family is OPEN_CLIP and (getattr(model, "final_ln_after_pool", False) or getattr(model, "attn_pool", None)):
        return replace(family, norm="")  # it is over pooled tokens
    return family


def family_at(model: nn.Module, blocks: str | Sequence[nn.Module], prefix_tokens: int = 0, norm: str = "") -> Family:
    """Return the family of a model with its blocks in a list, or at the path of one, such as `encoder.layers`.

    Blocks take and return `(B, T, D)`, which can be in a tuple or table, with the prefix tokens in front. `norm` is
    the path of a norm over all tokens after the last block. Raises UserError if a path leads to no modules.
    """
    found = (blocks if "*" in blocks else f"{blocks}.*") if isinstance(blocks, str) else tuple(blocks)
    for path, sort in ((found, LISTS), (norm, nn.Module)):
        if path != "" and not modules_at(model, path):
            names = [name for name, it in model.named_modules() if isinstance(it, sort) and modules_at(model, name)]
            what = f"a {type(model).__name__} has no {'list of modules' if sort is LISTS else 'module'} at '{path}'"
            raise UserError(what, "blocks=..., norm=...", closest(str(path).removesuffix(".*"), names))
    if prefix_tokens < 0:
        raise UserError(f"prefix_tokens is {prefix_tokens}", "prefix_tokens=...", "pass the number of tokens, from 0")
    return Family(found, norm, None, prefix_tokens)


def count_prefix(model: Any, prefix: str | int) -> int:
    """Return the number of prefix tokens: the number itself, or that of tokens `(1, K, D)` or `(D,)` at attributes."""
    if isinstance(prefix, int):
        return prefix
    paths = [path.split(".") for path in prefix.split(",")]
    values = [reduce(lambda part, name: getattr(part, name, None), path, model) for path in paths]
    return sum(it.shape[1:-1].numel() if isinstance(it, Tensor) else int(it or 0) for it in values)


def modules_at(model: nn.Module, path: Modules) -> list[nn.Module]:
    """Return the modules at paths, in order, without identities; none if a path does not exist."""
    if not isinstance(path, str):
        return list(path)
    modules: list[nn.Module] = []
    for part in filter(None, path.split(",")):
        found: list[nn.Module] = [model]
        for name in part.split("."):
            lists = [part for part in found if isinstance(part, LISTS)]
            if name == "*":
                found = [child for part in lists for child in part]
            elif name.lstrip("-").isdigit():
                found = [part[int(name)] for part in lists if int(name) < len(part)]
            else:
                found = [child for part in found if isinstance(child := getattr(part, name, None), nn.Module)]
        modules += [part for part in found if not isinstance(part, nn.Identity)]
    return modules


def _names(model: object) -> list[str]:
    """Return package and name of a model's classes; a module of torch's own base class is no wrapper of torch."""
    classes = [cls for cls in type(model).__mro__ if cls not in (nn.Module, object)]
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in classes]
