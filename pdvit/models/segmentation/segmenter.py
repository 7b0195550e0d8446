"""The segmentation model: images to the logits of their pixels."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from pdvit.config.schema import Config, SegmentConfig
from pdvit.models.build import check_memory, checkpoint_activations, create_model, sketch_model
from pdvit.models.checkpoints import export
from pdvit.models.layers import MODEL, image_size_of
from pdvit.models.segmentation.backbone import LINEAR, Adapter, arguments_of, make_adapter, prune
from pdvit.models.segmentation.heads import LinearHead, UPerNetHead
from pdvit.models.tokens import Taps
from pdvit.models.wrapper import Wrapper

# Settings in a file: the head, and how images are evaluated.
SETTINGS = ("head", "width", "aux", "norm", "crop", "short_side", "mode", "stride")
HEAD = "head."  # prefix of the head's weights


class SegmentOutput(NamedTuple):
    """The result of a forward pass."""

    logits: Tensor  # (B, C, h, w) on the head's grid, which covers the padded images: see `Segmenter.resize`
    aux: Tensor | None  # logits (B, C, h', w') of the auxiliary head, in training
    first: Tensor | None  # patch tokens (B, N, D) that the terms compare; None unless the model is trained
    last: Tensor | None
    others: tuple[Tensor, ...] = ()  # patch tokens of more layers, for the cosine term


class Segmenter(Wrapper):
    """A timm backbone, pruned by `backbone.prune`, with a segmentation head.

    `segment` has the head's type, width, norm and auxiliary head; `tokens` first, last and more layers, as in
    `DiverseModel`, of a model that is trained. Last is after the final norm only if the linear head is. Raises
    UserError if the maps do not fit the head, or the layers can't be compared.
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

    def forward(self, images: Tensor) -> SegmentOutput:
        """Run the model on normalized images `(B, 3, H, W)`, padded with zeros below and to the right."""
        (height, width), (down, right) = images.shape[-2:], self.adapter.padded(*images.shape[-2:])
        if (down, right) != (height, width):
            images = F.pad(images, (0, right - width, 0, down - height))
        read_maps = partial(self.adapter.maps, self.backbone)
        if self.taps is None:
            logits, aux = self.head(read_maps(images))
            return SegmentOutput(logits, aux, None, None)
        maps, (first, last, *others) = self.taps.read(read_maps, images)
        logits, aux = self.head(maps)
        return SegmentOutput(logits, aux, first, last, tuple(others))

    def resize(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Return logits `(B, C, *size)` of images of this size: bilinear (align_corners=False), without the padding."""
        full = F.interpolate(logits, self.adapter.padded(*size), mode="bilinear", align_corners=False)
        return full[..., : size[0], : size[1]]


def build_segmenter(config: Config, classes: int) -> Segmenter:
    """Build the model of a resolved configuration with fresh weights; raises UserError if backbone or head fail."""
    name, arguments, segment, diversity = str(config.model.name), arguments_of(config), config.segment, config.diversity
    sketch = copy.deepcopy(sketch_model(name, arguments))
    check_memory(sketch, MODEL)
    adapter = make_adapter(sketch, str(segment.head))
    backbone = create_model(name, arguments, MODEL)
    prune(backbone, adapter)
    segment = replace(segment, crop=segment.crop or image_size_of(backbone)[0])
    others = diversity.cosine_layers.replace(",", " ").split()
    tokens = (diversity.first or "block", diversity.last or "norm", others, bool(diversity.contrastive))
    segmenter = Segmenter(backbone, adapter, classes, segment, tokens)
    if config.model.grad_checkpointing:
        checkpoint_activations(backbone)
    return segmenter


def export_segmenter(
    segmenter: Segmenter,
    classes: list[str],
    palette: list[tuple[int, int, int]] | None,
    data_config: dict[str, Any],
    weights: str,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, bytes]:
    """Return the files of `checkpoints.export`, with weights `backbone.*` and `head.*`, which timm can't load."""
    settings = {key: value for key, value in asdict(segmenter.segment).items() if key in SETTINGS and value is not None}
    metadata: dict[str, Any] = {"segment": settings} | ({"palette": palette} if palette else {})
    return export(segmenter.backbone, classes, data_config, weights, state or segmenter.state_dict(), metadata)
