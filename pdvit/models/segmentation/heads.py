"""Segmentation heads: feature maps to logits."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pdvit.config.schema import Config
from pdvit.errors import UserError

DROPOUT = 0.1
# The auxiliary head reads the third map, with this many channels inside: MMSegmentation's settings.
AUX_MAP, AUX_WIDTH = 2, 256
# Most groups of a GroupNorm (arXiv 1803.08494), and fewest channels in each, because one value can't be normalized.
MAX_GROUPS, MIN_CHANNELS = 32, 4


class LinearHead(nn.Module):
    """A linear classifier of each token: one 1x1 convolution on the last map, after a norm if the backbone has none."""

    def __init__(self, width: int, classes: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(width, classes, 1)  # with torch's initialisation; docs/segment.md says why

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, None]:
        """Return the logits `(B, C, h, w)` of the last map."""
        tokens = self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classifier(self.dropout(tokens)), None


class UPerNetHead(nn.Module):
    """UPerNet (arXiv 1807.10221) with MMSegmentation's layers: dropout before the classifier, an FCN beside it.

    `widths` and `strides` are those of the four maps, `width` is that of the decoder. The norm is `batch` or `group`.
    """

    def __init__(
        self, widths: Sequence[int], strides: Sequence[int], classes: int, width: int, aux: bool, norm: str
    ) -> None:
        super().__init__()
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        self.neck = Neck(widths, strides)
        self.decoder = UPerNetDecoder([0, 0, *widths], encoder_depth=5, decoder_channels=width)
        # MMSegmentation normalizes the maps of a Swin, in its backbone, but not those of a plain transformer.
        if list(self.neck.parameters()):
            self.decoder.feature_norms = nn.ModuleList([nn.Identity() for _ in widths])
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(width, classes, 1)
        self.aux: nn.Module | None = None
        if aux:
            self.aux = nn.Sequential(
                nn.Conv2d(widths[AUX_MAP], AUX_WIDTH, 3, padding=1, bias=False),
                nn.BatchNorm2d(AUX_WIDTH),
                nn.ReLU(inplace=True),
                nn.Dropout2d(DROPOUT),
                nn.Conv2d(AUX_WIDTH, classes, 1),
            )
        replace_modules(self, norm)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return logits `(B, C, h, w)` on the finest grid, and in training those of the auxiliary head."""
        maps = self.neck(maps)
        aux = None
        if self.aux is not None and self.training:
            aux = self.aux(self.decoder.feature_norms[AUX_MAP](maps[AUX_MAP]))
        # The decoder skips the first two of six maps: smp counts those of strides 1 and 2.
        return self.classifier(self.dropout(self.decoder([None, None, *maps]))), aux


class Neck(nn.Module):
    """Scales four maps to the strides s/4, s/2, s and 2s, where s is the stride of the third.

    As in MMSegmentation's Feature2Pyramid, transposed convolutions enlarge and max-pooling reduces the maps.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        factors = [stride / strides[2] / size for stride, size in zip(strides, (1 / 4, 1 / 2, 1, 2), strict=True)]
        self.scales = nn.ModuleList(map(self._scale, widths, factors))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps `(B, D, h, w)` at those strides, finest first."""
        return [scale(feature_map) for scale, feature_map in zip(self.scales, maps, strict=True)]

    @staticmethod
    def _scale(width: int, factor: float) -> nn.Module:
        if factor == 4:
            first, second = (nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(2))
            return nn.Sequential(first, nn.BatchNorm2d(width), nn.GELU(), second)
        if factor == 2:
            return nn.ConvTranspose2d(width, width, 2, stride=2)
        if factor == 1:
            return nn.Identity()
        if factor == 0.5:
            return nn.MaxPool2d(2, ceil_mode=True)  # keeps a single token
        what = f"its maps can't form a pyramid: one would have to be scaled by {factor:g}"
        raise UserError(what, "segment.head (--head)", "use --head linear, or another model")


class Pool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling; axis by axis if kernels must be deterministic, which torch's on GPUs are not."""

    output_size: int

    def forward(self, input: Tensor) -> Tensor:
        """Return `(B, C, parts, parts)` of maps `(B, C, H, W)`."""
        if not torch.are_deterministic_algorithms_enabled():
            pooled: Tensor = super().forward(input)
            return pooled
        parts = self.output_size
        for axis in (2, 3):  # parts can overlap
            side = input.shape[axis]
            ends = [(part * side // parts, -(-(part + 1) * side // parts)) for part in range(parts)]
            input = torch.stack([input.narrow(axis, start, end - start).mean(axis) for start, end in ends], axis)
        return input


def replace_modules(module: nn.Module, norm: str) -> None:
    """Replace square adaptive poolings by `Pool`, and for the norm `group` BatchNorms by GroupNorms of most groups."""
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d) and isinstance(child.output_size, int):
            setattr(module, name, Pool(child.output_size))
        elif norm == "group" and isinstance(child, nn.BatchNorm2d):
            width = child.num_features
            most = min(MAX_GROUPS, width // MIN_CHANNELS)
            fitting = [groups for groups in range(1, most + 1) if width % groups == 0]
            setattr(module, name, nn.GroupNorm(max(fitting, default=1), width))
        else:
            replace_modules(child, norm)


def with_norm(config: Config, world_size: int, device: torch.device) -> Config:
    """Return a configuration with the norm of its head: the setting, else `batch`, or `group` for one image per pass.

    UPerNet pools each image to a single token, and a BatchNorm in training needs more than one value per channel.
    """
    segment, per_rank = config.segment, max(1, config.data.batch_size // world_size)
    micro_batch = min(config.data.micro_batch or per_rank, per_rank)
    images = min(micro_batch, per_rank % micro_batch or micro_batch)  # the last part of a batch may be shorter
    images *= world_size if device.type == "cuda" else 1  # SyncBatchNorm needs GPUs
    if segment.head == "linear":
        return config
    if segment.norm == "batch" and images < 2:
        what = "with one image per forward pass, a BatchNorm of UPerNet's pooled map has nothing to average"
        raise UserError(what, "segment.norm (--head-norm)", "use --head-norm group, or more images")
    return replace(config, segment=replace(segment, norm=segment.norm or ("batch" if images > 1 else "group")))
