import pytest
import torch
from torch import nn

from pdvit.config.schema import SegmentConfig
from pdvit.errors import UserError
from pdvit.models.segmentation.heads import group_norm, replace_modules, resolve_norm


@pytest.mark.parametrize(
    ("given", "images", "norm"), [(None, 2, "batch"), (None, 1, "group"), ("group", 8, "group"), ("batch", 2, "batch")]
)
def test_unset_it_is_batch_but_for_single_images(given, images, norm):
    assert resolve_norm(SegmentConfig(head="upernet", norm=given), images) == norm


def test_a_batch_norm_over_one_image_is_refused():
    with pytest.raises(UserError, match=r"(?s)one image.*--head-norm group"):
        resolve_norm(SegmentConfig(head="upernet", norm="batch"), 1)


@pytest.mark.parametrize("given", [None, "batch", "group"])
def test_a_linear_head_has_none_so_what_is_given_stays(given):
    assert [resolve_norm(SegmentConfig(head="linear", norm=given), images) for images in (1, 2)] == [given] * 2


@pytest.mark.parametrize(("width", "groups"), [(512, 32), (64, 16), (8, 2), (50, 10), (13, 1), (3, 1)])
def test_groups_divide_the_channels_and_have_four_at_least(width, groups):
    assert group_norm(nn.BatchNorm2d(width)).num_groups == groups


def test_every_batch_norm_is_replaced_at_any_depth():
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), nn.BatchNorm2d(8))
    replace_modules(module, group_norm)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    one, two = torch.randn(2, 1, 3, 4, 4)
    both = module(torch.cat([one, two]))
    torch.testing.assert_close(both, torch.cat([module(one), module(two)]))
