"""The segmentation model: any timm transformer as its backbone, for images of any size, and a head."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn
from torch.nn import functional as F

from pdvit.config.schema import Config, SegmentConfig
from pdvit.errors import UserError
from pdvit.losses.objective import TokenOutput
from pdvit.models.build import (
    build_model,
    checkpoint_activations,
    create_model,
    model_arguments,
    sketch_model,
    strides_of,
)
from pdvit.models.checkpoints import export
from pdvit.models.families import family_of, modules_at
from pdvit.models.layers import MODEL, evaluating, image_size_of
from pdvit.models.segmentation.heads import LinearHead, UPerNetHead
from pdvit.models.tokens import Taps
from pdvit.models.wrapper import Wrapper

LINEAR = "linear"
# Arguments of some models that let them take images of any size. `always_partition` keeps Swin's windows shifted and
# of one size in every stage, also if the map of the crop is a single window.
OPTIONS = ("dynamic_img_size", "always_partition")
MAPS = 4  # a head of the pyramid reads four maps
# Settings in a file: the head, and how images are evaluated.
SETTINGS = ("head", "width", "aux", "norm", "crop", "short_side", "mode", "stride")
HEAD = "head."  # prefix of the head's weights


@dataclass(frozen=True)
class Adapter:
    """How a backbone's maps are read."""

    indices: tuple[int, ...]  # of the maps in `forward_intermediates`; a plain model of under four blocks repeats some
    norm: bool  # the last map is the output of the model's final norm
    strides: tuple[int, ...]  # pixels per token of each map
    widths: tuple[int, ...]  # channels of each map
    multiple: int  # sides of images are padded to a multiple of it
    size: tuple[int, int]  # height and width of the images that the backbone was built for
    any_size: bool = True  # it takes others too
    pruned: frozenset[str] = frozenset()  # names of the model's weights that no head reads

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which images of this size are padded; raises UserError if they are too large."""
        if self.any_size:
            return height + -height % self.multiple, width + -width % self.multiple
        if height > self.size[0] or width > self.size[1]:
            what = f"the backbone takes images of {self.size[0]}x{self.size[1]} only, not {height}x{width}"
            raise UserError(what, MODEL, "evaluate windows of the crop's size: --eval-mode slide")
        return self.size

    def maps(self, model: Any, images: Tensor) -> list[Tensor]:
        """Return the maps `(B, D, h, w)` of images of a padded size, finest first."""
        read = sorted({*self.indices})
        maps = model.forward_intermediates(
            images, indices=read, norm=self.norm, intermediates_only=True, output_fmt="NCHW"
        )
        layout = torch.channels_last if images.is_cuda else torch.contiguous_format  # convolutions of a GPU are faster
        return [maps[read.index(index)].contiguous(memory_format=layout) for index in self.indices]


class Segmenter(Wrapper):
    """A timm backbone, pruned by `prune`, with a segmentation head.

    `tokens` are first, last and more layers, as in `DiverseModel`, of a model that is trained. Last is after the final
    norm only if the linear head is. Raises UserError if the maps do not fit the head, or the layers can't be compared.
    """

    inner = "backbone"

    def __init__(
        self,
        backbone: nn.Module,
        adapter: Adapter,
        classes: int,
        segment: SegmentConfig,
        tokens: tuple[str | int, str, Sequence[int | str], bool] | None = None,
    ) -> None:
        super().__init__()
        norm = segment.norm or "batch"
        self.backbone, self.adapter, self.segment = backbone, adapter, replace(segment, norm=norm)
        self.head: LinearHead | UPerNetHead
        if segment.head == LINEAR:
            self.head = LinearHead(adapter.widths[-1], classes, not adapter.norm)
        else:
            self.head = UPerNetHead(adapter.widths, adapter.strides, classes, segment.width, segment.aux > 0, norm)
        self.taps = None if tokens is None else Taps(backbone, *tokens)

    def forward(self, images: Tensor) -> TokenOutput:
        """Run the model on normalized images `(B, 3, H, W)`, padded with zeros below and to the right.

        Logits `(B, C, h, w)` are on the head's grid, which covers the padded images: see `resize`; those of the
        auxiliary head are on another. First and last are None unless the model is trained.
        """
        maps, (first, last, *others) = self._read(images)
        logits, aux = self.head(maps)
        return TokenOutput(logits, first, last, None, tuple(others), aux=aux)

    @torch.no_grad()
    def last_tokens(self, images: Tensor) -> Tensor:
        """Return the last patch tokens of a model that is trained, without gradient."""
        last: Tensor = self._read(images)[1][1]
        return last

    def _read(self, images: Tensor) -> tuple[list[Tensor], Any]:
        """Return the maps that the head reads, and the tokens of first, last and more layers."""
        (height, width), (down, right) = images.shape[-2:], self.adapter.padded(*images.shape[-2:])
        if (down, right) != (height, width):
            images = F.pad(images, (0, right - width, 0, down - height))
        read_maps = partial(self.adapter.maps, self.backbone)
        return (read_maps(images), (None, None)) if self.taps is None else self.taps.read(read_maps, images)

    def resize(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Return logits `(B, C, *size)` of images of this size: bilinear (align_corners=False), without the padding."""
        full = F.interpolate(logits, self.adapter.padded(*size), mode="bilinear", align_corners=False)
        return full[..., : size[0], : size[1]]


def build_segmenter(config: Config, classes: int) -> Segmenter:
    """Build the model of a resolved configuration with fresh weights; raises UserError if backbone or head fail."""
    name, arguments, segment, diversity = str(config.model.name), arguments_of(config), config.segment, config.diversity
    adapter = make_adapter(copy.deepcopy(sketch_model(name, arguments)), str(segment.head))
    backbone = build_model(name, arguments)
    prune(backbone, adapter)
    segment = replace(segment, crop=segment.crop or image_size_of(backbone)[0])
    others = diversity.cosine_layers.replace(",", " ").split()
    tokens = (diversity.first or "block", diversity.last or "norm", others, bool(diversity.contrastive))
    if config.model.grad_checkpointing:
        checkpoint_activations(backbone)
    return Segmenter(backbone, adapter, classes, segment, tokens)


def export_segmenter(
    segmenter: Segmenter,
    classes: list[str],
    palette: list[tuple[int, int, int]] | None,
    data_config: dict[str, Any],
    weights: str,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, bytes]:
    """Return the files of a segmentation model, which timm can't load: see `checkpoints.export`."""
    settings = {key: value for key, value in asdict(segmenter.segment).items() if key in SETTINGS and value is not None}
    metadata: dict[str, Any] = {"segment": settings} | ({"palette": palette} if palette else {})
    return export(segmenter.backbone, classes, data_config, weights, state or segmenter.state_dict(), metadata)


def arguments_of(config: Config) -> dict[str, Any]:
    """Return timm's arguments of a resolved configuration's model; raises UserError as `model_arguments`.

    A segmentation backbone has no classifier. Its size is the crop, else the image size, padded to whole patches.
    """
    side = config.data.img_size
    if config.segment.head is None:
        return model_arguments(config.model, side)
    arguments, crop = model_arguments(config.model, None), config.segment.crop or side
    model = sketch_model(str(config.model.name), {})
    if arguments and crop is not None:  # they can change the patches
        with torch.device("meta"):
            model = create_model(str(config.model.name), arguments, MODEL)
    parameters = {name for cls in type(model).__mro__ for name in signature(cls.__init__).parameters}  # type: ignore[misc]
    size = {} if crop is None else {"img_size": crop + -crop % strides_of(model)[-1]}
    return {option: True for option in OPTIONS if option in parameters} | arguments | size | {"num_classes": 0}


def make_adapter(sketch: nn.Module, head: str) -> Adapter:
    """Return how a head reads a model on the meta device, and prune that model; UserError if it can't be read.

    `upernet` reads four maps: the ends of the last four stages, or of the four quarters of a plain model's blocks.
    `linear` reads the last map, after the final norm over tokens if there is one.
    """
    family, name = family_of(sketch), type(sketch).__name__
    if not hasattr(sketch, "forward_intermediates"):
        raise UserError(f"timm returns no feature maps of a {name}", MODEL, "use another model")
    infos: Any = sketch.feature_info
    strides, count = strides_of(sketch), len(infos)
    if head == LINEAR:
        indices = [count - 1]
    elif family.plain:
        indices = [-(-count * part // MAPS) - 1 for part in range(1, MAPS + 1)]
    elif count >= MAPS:
        indices = list(range(count - MAPS, count))
    else:
        what = f"a {name} has {count} maps of different sizes, and this head reads four"
        raise UserError(what, MODEL, "use --head linear, or another model")
    adapter = Adapter(
        indices=tuple(indices),
        norm=head == LINEAR and bool(modules_at(sketch, family.norm)),
        strides=tuple(strides[index] for index in indices),
        widths=tuple(int(infos[index]["num_chs"]) for index in indices),
        multiple=strides[0] if name.startswith("SwinTransformer") else strides[-1],  # Swin pads its later maps itself
        size=image_size_of(sketch),
    )
    whole = sketch.state_dict().keys()
    prune(sketch, adapter)
    pruned = frozenset(whole - sketch.state_dict().keys())
    return replace(adapter, any_size=_takes_any_size(sketch, adapter), pruned=pruned)


def prune(model: Any, adapter: Adapter) -> None:
    """Remove the parts of a timm model that no head reads, and make Swin's blocks pad before they roll."""
    model.prune_intermediate_layers(sorted({*adapter.indices}), prune_norm=not adapter.norm, prune_head=True)
    pad_before_roll(model)


def _takes_any_size(sketch: nn.Module, adapter: Adapter) -> bool:
    """Try a size that is neither square nor the model's own, on the meta device."""
    height, width = (side + -side % adapter.multiple for side in adapter.size)
    images = torch.empty(1, 3, height + adapter.multiple, width + 2 * adapter.multiple, device="meta")
    try:
        with torch.no_grad(), evaluating(sketch):
            adapter.maps(sketch, images)
    except Exception:  # timm and torch raise nearly anything if sizes do not fit
        return False
    return True


def pad_windows(attend: Callable[[Tensor], Tensor], block: Any, tokens: Tensor) -> Tensor:
    """Return `attend(tokens)` of tokens `(B, H, W, D)` that are padded to whole windows before, as in the original.

    timm rolls first. What it pads then lies between two borders of the image, whose tokens would attend to each other.
    """
    height, width = tokens.shape[1:3]
    down, right = -height % block.window_size[0], -width % block.window_size[1]
    if down or right:
        tokens = F.pad(tokens, (0, 0, 0, right, 0, down))
    return attend(tokens)[:, :height, :width]


class _PaddedSwin(swin_transformer.SwinTransformerBlock):
    def _attn(self, x: Tensor) -> Tensor:
        return pad_windows(super()._attn, self, x)


class _PaddedSwinV2(swin_transformer_v2.SwinTransformerV2Block):
    def _attn(self, x: Tensor) -> Tensor:
        return pad_windows(super()._attn, self, x)


class _PaddedSwinV2Cr(swin_transformer_v2_cr.SwinTransformerV2CrBlock):
    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return pad_windows(super()._shifted_window_attn, self, x)


PADDED: dict[type[nn.Module], type[nn.Module]] = {
    block.__mro__[1]: block for block in (_PaddedSwin, _PaddedSwinV2, _PaddedSwinV2Cr)
}


def pad_before_roll(model: nn.Module) -> None:
    """Let Swin, SwinV2 and SwinV2-CR pad before they roll: by the class of their blocks, so that copies are whole."""
    for module in model.modules():
        if type(module) in PADDED:
            module.__class__ = PADDED[type(module)]
