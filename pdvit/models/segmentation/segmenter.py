"""A backbone with a head: images to the logits of their pixels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from pdvit.config.schema import Config, SegmentConfig
from pdvit.models.build import checkpoint_activations, create_model, sketch_model
from pdvit.models.layers import image_size_of
from pdvit.models.memory import check_fits
from pdvit.models.reading import Tap, layer_numbers, layers_to_read, tapped, taps_at
from pdvit.models.segmentation.backbone import MODEL, Adapter, arguments_of, look_at, prune
from pdvit.models.segmentation.heads import make_head
from pdvit.models.wrapper import Wrapper

# The terms that see tokens; `config.resolve` refuses the mixing term, which needs the class of every patch.
TOKEN_TERMS = ("cosine", "contrastive", "koleo", "spectral")


class SegmentOutput(NamedTuple):
    """A forward pass.

    Attributes:
        logits: `(B, C, h, w)` on the head's grid, which covers the padded images: see `Segmenter.resize`.
        aux: those of the auxiliary head `(B, C, h', w')`, in training; else None.
        first, last: patch tokens `(B, N, D)` that the terms compare, or None where no term does.
        others: patch tokens of more layers, for the cosine term.
    """

    logits: Tensor
    aux: Tensor | None
    first: Tensor | None
    last: Tensor | None
    others: tuple[Tensor, ...] = ()


class Segmenter(Wrapper):
    """A timm backbone with a head.

    Args:
        backbone: a bare timm model, pruned: see `backbone.prune`.
        adapter: how its maps are read.
        classes: number of classes.
        segment: kind, width, norm and auxiliary head; the crop's side is set.
        tokens: first, last and more layers, as `DiverseModel` takes them, where a term compares tokens. Last is behind
            the final norm only where the head is, which is `linear`'s.

    Raises:
        UserError: the maps do not fit the head, or the layers can't be compared.
    """

    inner = "backbone"

    def __init__(
        self,
        backbone: nn.Module,
        adapter: Adapter,
        classes: int,
        segment: SegmentConfig,
        tokens: tuple[str | int, str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        assert segment.head is not None, "this is for segmentation alone"
        norm = segment.norm or "batch"
        self.backbone, self.adapter, self.segment = backbone, adapter, replace(segment, norm=norm)
        self.head = make_head(adapter, classes, segment.head, segment.width, segment.aux > 0, norm)
        self.names: tuple[str, ...] = ()
        self.taps: dict[str, Tap] = {}
        if tokens is not None:
            layers = layers_to_read(backbone, *tokens)
            self.names = (layers.first, layers.last, *layers.others)
            self.taps = taps_at(layers.places, self.names)

    def forward(self, images: Tensor) -> SegmentOutput:
        """Run backbone and head on normalized images `(B, 3, H, W)` of any size that the adapter takes.

        Images are padded with zeros, below and to the right.
        """
        (height, width), (down, right) = images.shape[-2:], self.adapter.padded(*images.shape[-2:])
        if (down, right) != (height, width):
            images = F.pad(images, (0, right - width, 0, down - height))
        maps, tokens = tapped(self.taps, self._maps, images)
        logits, aux = self.head(maps)
        if not self.names:
            return SegmentOutput(logits, aux, None, None)
        first, last, *others = (tokens[name] for name in self.names)
        return SegmentOutput(logits, aux, first, last, tuple(others))

    def resize(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return logits `(B, C, h, w)` of images of this size at the same, `(B, C, *size)`.

        Bilinear, `align_corners=False`. Logits cover the padded image: what lies outside of the image is cut off.
        """
        full = F.interpolate(logits, self.adapter.padded(*size), mode="bilinear", align_corners=False)
        return full[..., : size[0], : size[1]]

    def _maps(self, images: Tensor) -> list[Tensor]:
        return self.adapter.maps(self.backbone, images)


def build_segmenter(config: Config, classes: int) -> Segmenter:
    """Build the model of a resolved configuration with fresh weights.

    Where a term other than mixing has a weight, the forward pass returns the tokens that it compares.

    Raises:
        UserError: timm can't build the backbone, pdvit can't read it, or its maps do not fit the head.
    """
    model, diversity, segment = config.model, config.diversity, config.segment
    assert model.name is not None, "resolve the configuration first"
    tokens = None
    if any(getattr(diversity, term) for term in TOKEN_TERMS):
        tokens = (diversity.first or "block", diversity.last or "norm", layer_numbers(diversity.cosine_layers))
    segmenter = make_segmenter(model.name, arguments_of(config), classes, segment, tokens)
    if model.grad_checkpointing:
        checkpoint_activations(segmenter.backbone)
    return segmenter


def make_segmenter(
    name: str,
    arguments: dict[str, Any],
    classes: int,
    segment: SegmentConfig,
    tokens: tuple[str | int, str, Sequence[int]] | None = None,
    where: str = MODEL,
) -> Segmenter:
    """Build a model with fresh weights from timm's name and arguments of its backbone. Raises UserError."""
    assert segment.head is not None, "this is for segmentation alone"
    sketch = sketch_model(name, arguments, where)
    check_fits(sketch.state_dict().values(), where)
    adapter = look_at(sketch, segment.head)
    backbone = create_model(name, arguments, where)
    prune(backbone, adapter)
    segment = replace(segment, crop=segment.crop or image_size_of(backbone)[0])
    return Segmenter(backbone, adapter, classes, segment, tokens)
