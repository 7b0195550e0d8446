"""A pyramid from maps that are not one: a plain transformer's, which all have one stride, and VOLO's."""

from collections.abc import Sequence

from torch import Tensor, nn

from pdvit.errors import UserError


class Neck(nn.Module):
    """Brings four maps to the strides s/4, s/2, s and 2s, where s is the stride of the third.

    A map grows by transposed convolutions and shrinks by max-pooling, as mmsegmentation's Feature2Pyramid does. Maps
    that have these strides stay as they are.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        wanted = [strides[2] / 4, strides[2] / 2, strides[2], strides[2] * 2]
        factors = [have / want for have, want in zip(strides, wanted, strict=True)]
        self.scales = nn.ModuleList([_scale(width, factor) for width, factor in zip(widths, factors, strict=True)])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps `(B, D, h, w)` at those strides, finest first."""
        return [scale(one) for scale, one in zip(self.scales, maps, strict=True)]


def _scale(width: int, factor: float) -> nn.Module:
    if factor == 4:
        return nn.Sequential(_twice(width), nn.BatchNorm2d(width), nn.GELU(), _twice(width))
    if factor == 2:
        return _twice(width)
    if factor == 1:
        return nn.Identity()
    if factor == 0.5:
        return nn.MaxPool2d(2, ceil_mode=True)  # of a single token, that token
    raise UserError(
        f"its maps can't be made a pyramid: one would have to be scaled by {factor:g}",
        "segment.head (--head)",
        "use --head linear, or another model",
    )


def _twice(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, 2, stride=2)
