"""Heads: feature maps to the logits of every place."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.segmentation.neck import Neck
from pdvit.models.segmentation.norms import with_group_norm
from pdvit.models.segmentation.pooling import with_pools

if TYPE_CHECKING:
    from pdvit.models.segmentation.backbone import Adapter

DROPOUT = 0.1
# Classifiers begin as torch makes them. With mmsegmentation's deviation of 0.01 a small model trained from scratch told
# objects from the ground, and for hundreds of steps not from each other: docs/segment.md has the numbers.
# The auxiliary head reads the third map, with so many channels inside: mmsegmentation's settings.
AUX_MAP, AUX_WIDTH = 2, 256


class LinearHead(nn.Module):
    """One 1x1 convolution on the last map: a linear classifier of each token.

    Where the backbone has no norm of its own over these tokens, they pass through one first.
    """

    def __init__(self, width: int, classes: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, None]:
        """Return the logits `(B, C, h, w)` of the last map."""
        tokens = self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classifier(self.dropout(tokens)), None


class UPerNetHead(nn.Module):
    """UPerNet (arXiv 1807.10221) with mmsegmentation's layers: dropout before the classifier, an FCN beside it.

    Args:
        widths, strides: of the four maps.
        classes: number of classes.
        width: channels inside the decoder.
        aux: whether there is an auxiliary head, on the third map; in training alone.
        norm: `batch` or `group`, of decoder, auxiliary head and neck.
    """

    def __init__(
        self, widths: Sequence[int], strides: Sequence[int], classes: int, width: int, aux: bool, norm: str
    ) -> None:
        super().__init__()
        self.neck = Neck(widths, strides)
        self.decoder = _decoder(widths, width)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(width, classes, 1)
        self.aux = _fcn(widths[AUX_MAP], classes) if aux else None
        if norm == "group":
            with_group_norm(self)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return logits `(B, C, h, w)` on the finest grid, and in training those of the auxiliary head."""
        maps = self.neck(maps)
        aux = None
        if self.aux is not None and self.training:
            aux = self.aux(self.decoder.feature_norms[AUX_MAP](maps[AUX_MAP]))  # type: ignore[index,operator]
        # The decoder passes over the first two of six maps: smp counts those of strides 1 and 2.
        return self.classifier(self.dropout(self.decoder([None, None, *maps]))), aux


def make_head(adapter: "Adapter", classes: int, head: str, width: int, aux: bool, norm: str) -> nn.Module:
    """Return a fresh head for a backbone's maps; UserError where they do not fit it."""
    if head == "linear":
        return LinearHead(adapter.widths[-1], classes, not adapter.norm)
    return UPerNetHead(adapter.widths, adapter.strides, classes, width, aux, norm)


def _decoder(widths: Sequence[int], width: int) -> nn.Module:
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as error:
        what = f"UPerNet needs a package that can't be imported: {error}"
        tip = "install segmentation-models-pytorch 0.5 or 0.6, or use --head linear"
        raise UserError(what, "segment.head (--head)", tip) from error
    decoder: nn.Module = UPerNetDecoder([0, 0, *widths], encoder_depth=5, decoder_channels=width)
    with_pools(decoder)
    return decoder


def _fcn(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, AUX_WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(AUX_WIDTH),
        nn.ReLU(inplace=True),
        nn.Dropout2d(DROPOUT),
        nn.Conv2d(AUX_WIDTH, classes, 1),
    )
