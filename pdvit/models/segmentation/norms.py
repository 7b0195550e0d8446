"""The norm inside the UPerNet head: over the images of a batch, or over the groups of channels of each."""

import torch
from torch import nn

from pdvit.config.schema import SegmentConfig
from pdvit.errors import UserError

# Groups of a GroupNorm at most (arXiv 1803.08494), and channels in each at least: one value can't be normalized.
GROUPS, LEAST = 32, 4


def settle_norm(segment: SegmentConfig, images: int) -> str | None:
    """Return the norm of the head: what is set, or `batch`, or `group` where the statistics are of one image.

    A linear head has none, and unset stays unset.

    UPerNet pools each image to a single token, and a BatchNorm in training needs more than one value per channel.

    Args:
        segment: the section of a configuration.
        images: how many images the statistics of a forward pass are of, at least: those of one process, or of all
            where SyncBatchNorm joins them (GPUs).

    Raises:
        UserError: `batch` is set, and statistics would be of one image.
    """
    if segment.head == "linear":
        return segment.norm
    if segment.norm == "batch" and images < 2:
        what = "with one image per forward pass a BatchNorm of UPerNet's pooled map has nothing to average over"
        raise UserError(what, "segment.norm (--head-norm)", "use --head-norm group, or more images")
    return segment.norm or ("batch" if images > 1 else "group")


def share_statistics(module: nn.Module, device: torch.device, processes: int) -> None:
    """Let each BatchNorm inside average over the images of all processes, in place; torch can on GPUs alone.

    Statistics of a share of the batch would be poor ones.
    """
    if device.type == "cuda" and processes > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)


def with_group_norm(module: nn.Module) -> None:
    """Replace every BatchNorm inside by a GroupNorm, whose statistics are each image's own."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, group_norm(child.num_features))
        else:
            with_group_norm(child)


def group_norm(width: int) -> nn.GroupNorm:
    """Return a GroupNorm of as many groups as divide the channels, up to 32."""
    fitting = [count for count in range(1, GROUPS + 1) if width % count == 0 and width >= count * LEAST]
    return nn.GroupNorm(max(fitting, default=1), width)
