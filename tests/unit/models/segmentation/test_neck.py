import pytest
import torch

from pdvit.errors import UserError
from pdvit.models.segmentation.heads import Neck


def maps(strides, side=64, width=4):
    return [torch.randn(1, width, side // stride, side // stride) for stride in strides]


@pytest.mark.parametrize(
    ("strides", "sides"),
    [
        ((16, 16, 16, 16), [16, 8, 4, 2]),  # a plain model
        ((8, 16, 16, 16), [16, 8, 4, 2]),  # VOLO
        ((4, 8, 16, 32), [16, 8, 4, 2]),
    ],
)
def test_it_makes_strides_4_8_16_32(strides, sides):
    found = Neck([4] * 4, strides)(maps(strides))
    assert [one.shape[-1] for one in found] == sides


def test_a_pyramid_stays_as_it_is():
    strides = (4, 8, 16, 32)
    neck, given = Neck([4] * 4, strides), maps(strides)
    assert list(neck.parameters()) == []
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(neck(given), given, strict=True))


def test_its_size_for_a_base_vit_is_that_of_mmsegmentation():
    with torch.device("meta"):
        neck = Neck([768] * 4, [16] * 4)
    assert round(sum(weight.numel() for weight in neck.parameters()) / 1e6, 2) == 7.08


def test_what_can_be_no_pyramid_is_refused():
    with pytest.raises(UserError, match=r"(?s)scaled by 8.*--head linear"):
        Neck([4] * 4, (32, 16, 16, 16))
