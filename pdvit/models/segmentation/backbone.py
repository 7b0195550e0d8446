"""The adapter: any timm transformer as a backbone of feature maps, at any crop."""

from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from pdvit.config.schema import Config
from pdvit.errors import UserError
from pdvit.models.build import create_model, model_arguments, plain_sketch
from pdvit.models.families import family_of, modules_at
from pdvit.models.layers import evaluating, image_size_of
from pdvit.models.segmentation.swin import pad_before_roll

LINEAR, UPERNET = "linear", "upernet"
MODEL = "model.name (--model)"
# What lets a model take images of any size, where it has such an argument. `always_partition` keeps Swin's windows of
# one size and shifted in every stage, also where the map of the crop is a single window.
OPTIONS = ("dynamic_img_size", "always_partition")
# A head of the pyramid reads four maps.
MAPS = 4


@dataclass(frozen=True)
class Adapter:
    """How a backbone's maps are read.

    Attributes:
        indices: of timm's `forward_intermediates`, each once.
        order: which of those each map is; a plain model of fewer than four blocks gives one several times.
        norm: whether the last map is behind the model's final norm.
        strides: pixels of the image per token of each map.
        widths: channels of each map.
        multiple: sides of images are padded to a multiple of it.
        size: height and width of the images that it was built for.
        any_size: whether it takes others.
        pruned: names of the model's weights that no head reads.
    """

    indices: tuple[int, ...]
    order: tuple[int, ...]
    norm: bool
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    multiple: int
    size: tuple[int, int]
    any_size: bool = True
    pruned: frozenset[str] = frozenset()

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that images of this size are padded to. Raises UserError where they are too large."""
        if self.any_size:
            return height + -height % self.multiple, width + -width % self.multiple
        if height > self.size[0] or width > self.size[1]:
            what = f"the backbone takes images of {self.size[0]}x{self.size[1]} alone, and this is {height}x{width}"
            raise UserError(what, MODEL, "evaluate windows of the crop's size: --eval-mode slide")
        return self.size

    def maps(self, model: Any, images: Tensor) -> list[Tensor]:
        """Return the maps `(B, D, h, w)` of images whose size fits, finest first."""
        found = model.forward_intermediates(
            images, indices=list(self.indices), norm=self.norm, intermediates_only=True, output_fmt="NCHW"
        )
        return [found[index] for index in self.order]


def arguments_of(config: Config) -> dict[str, Any]:
    """Return timm's arguments of a resolved configuration's model: of a segmentation, of its backbone.

    Its crop is `segment.crop`, or else the image size, or else the model's own. Raises UserError as `model_arguments`
    and `backbone_arguments` do.
    """
    model, segment, side = config.model, config.segment, config.data.img_size
    assert model.name is not None, "resolve the configuration first"
    if segment.head is None:
        return model_arguments(model, side)
    return backbone_arguments(model.name, model_arguments(model, None), segment.crop or side)


def backbone_arguments(name: str, arguments: dict[str, Any], crop: int | None = None) -> dict[str, Any]:
    """Return timm's arguments of a backbone without classifier, for square crops of this side (else the model's own).

    The side is the next that the patches fit, since images are padded to it. Raises UserError where timm can't build
    the model.
    """
    model = plain_sketch(name, MODEL)
    sized = {key: value for key, value in arguments.items() if key != "img_size"}
    if sized and crop is not None:  # they may change the patches
        with torch.device("meta"):
            model = create_model(name, sized, MODEL)
    options = {option: True for option in OPTIONS if _takes(model, option)}
    side = {} if crop is None else {"img_size": crop + -crop % _strides(model)[-1]}
    return options | arguments | side | {"num_classes": 0}


def _takes(model: nn.Module, option: str) -> bool:
    """Tell whether the constructor of a model's class has an argument."""
    return any(option in signature(cls.__init__).parameters for cls in type(model).__mro__)  # type: ignore[misc]


def look_at(sketch: nn.Module, head: str) -> Adapter:
    """Find out how the maps of a model on the meta device are read; it is pruned on the way.

    `upernet` reads four maps: the ends of the four stages, or of the four quarters of a plain model's blocks. `linear`
    reads the last, behind the final norm where the model has one over tokens.

    Raises:
        UserError: the family is not one that pdvit reads, or has fewer than four maps.
    """
    family, model = family_of(sketch), _parts(sketch)
    infos, strides = model.feature_info, _strides(model)
    indices: tuple[int, ...] = (len(infos) - 1,)
    order: tuple[int, ...] = (0,)
    if head != LINEAR:
        indices, order = _four(len(infos), family.plain, type(model).__name__)
    norm = head == LINEAR and bool(modules_at(model, family.norm))
    widths = tuple(int(infos[indices[at]]["num_chs"]) for at in order)
    reached = tuple(strides[indices[at]] for at in order)
    adapter = Adapter(indices, order, norm, reached, widths, _multiple(model, strides), image_size_of(model))
    whole = sketch.state_dict().keys()
    prune(sketch, adapter)
    pruned = frozenset(whole - sketch.state_dict().keys())
    return replace(adapter, any_size=_takes_any(sketch, adapter), pruned=pruned)


def prune(model: Any, adapter: Adapter) -> None:
    """Make a bare timm model a backbone: without what no head reads, and Swin's blocks pad before they roll."""
    model.prune_intermediate_layers(list(adapter.indices), prune_norm=not adapter.norm, prune_head=True)
    pad_before_roll(model)


def _takes_any(sketch: nn.Module, adapter: Adapter) -> bool:
    """Try a size that is not the model's own, nor square, on the meta device."""
    height, width = (side + -side % adapter.multiple for side in adapter.size)
    other = height + adapter.multiple, width + 2 * adapter.multiple
    try:
        with torch.no_grad(), evaluating(sketch):
            adapter.maps(sketch, torch.empty(1, 3, *other, device="meta"))
    except Exception:  # timm and torch raise nearly anything where sizes do not fit
        return False
    return True


def _four(count: int, plain: bool, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which of `count` maps to read, and the order in which they make four."""
    if plain:
        quarters = [-(-count * part // MAPS) - 1 for part in range(1, MAPS + 1)]
        indices = tuple(dict.fromkeys(quarters))
        return indices, tuple(indices.index(at) for at in quarters)
    if count < MAPS:
        what = f"a {kind} has {count} maps of different sizes, and this head reads four"
        raise UserError(what, MODEL, "use --head linear, or another model")
    return tuple(range(count - MAPS, count)), tuple(range(MAPS))


def _parts(model: Any) -> Any:
    """Return the model as timm's, where it can hand out maps."""
    if not hasattr(model, "forward_intermediates"):
        what = f"timm hands out no feature maps of a {type(model).__name__}"
        raise UserError(what, MODEL, "use another model")
    return model


def _strides(model: Any) -> list[int]:
    """Return the pixels per token of every map that timm hands out."""
    told = [info["reduction"] for info in model.feature_info]
    return [int(one if isinstance(one, int) else one[0]) for one in told]


def _multiple(model: nn.Module, strides: list[int]) -> int:
    """Return what the sides of images have to be multiples of: Swin pads the maps of its later stages itself."""
    return strides[0] if type(model).__name__.startswith("SwinTransformer") else strides[-1]
