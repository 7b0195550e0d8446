import pytest
import torch
from torch import nn

from pdvit.config.schema import Config, DataConfig, SegmentConfig
from pdvit.errors import UserError
from pdvit.models.segmentation.heads import Neck, Pool, UPerNetHead, replace_modules, with_norm

CPU = torch.device("cpu")


@pytest.mark.parametrize("strides", [(16, 16, 16, 16), (8, 16, 16, 16), (4, 8, 16, 32)], ids=["plain", "volo", "swin"])
def test_the_neck_makes_strides_4_8_16_32_and_leaves_a_pyramid(strides):
    maps = [torch.randn(1, 4, 64 // stride, 64 // stride) for stride in strides]
    neck = Neck([4] * 4, strides)
    found = neck(maps)
    assert [scaled.shape[-1] for scaled in found] == [16, 8, 4, 2]
    if strides == (4, 8, 16, 32):
        assert list(neck.parameters()) == []
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, maps, strict=True))


def test_upernet_on_a_plain_model_has_the_layers_of_mmsegmentation_and_no_other():
    with torch.device("meta"):
        head = UPerNetHead([768] * 4, [16] * 4, 150, 512, aux=False, norm="batch")

    def convolution(width, side=1):  # with its BatchNorm, to 512 channels
        return 512 * width * side**2 + 2 * 512

    pooled, laterals, merged = 4 * convolution(768), 3 * convolution(768), 3 * convolution(512, 3)
    joined = convolution(768 + 4 * 512, 3) + convolution(4 * 512, 3)
    expected = pooled + laterals + merged + joined + 512 * 150 + 150
    neck, whole = (sum(weight.numel() for weight in part.parameters()) for part in (head.neck, head))
    assert round(neck / 1e6, 2) == 7.08
    assert whole - neck == expected


@pytest.mark.parametrize(
    ("head", "setting", "images", "norm"),
    [
        *(("upernet", None, 2, "batch"), ("upernet", None, 1, "group")),
        *(("upernet", "group", 8, "group"), ("upernet", "batch", 2, "batch")),
        *(("linear", None, 1, None), ("linear", "batch", 1, "batch")),  # it has no norm, so any setting stays
    ],
)
def test_the_norm_is_batch_by_default_except_for_single_images(head, setting, images, norm):
    config = Config(data=DataConfig(batch_size=images), segment=SegmentConfig(head=head, norm=setting))
    assert with_norm(config, 1, CPU).segment.norm == norm


def test_norms_and_strides_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"(?s)one image.*--head-norm group"):
        with_norm(Config(data=DataConfig(batch_size=1), segment=SegmentConfig("upernet", norm="batch")), 1, CPU)
    with pytest.raises(UserError, match=r"(?s)scaled by 8.*--head linear"):
        Neck([4] * 4, (32, 16, 16, 16))


def test_every_batch_norm_is_replaced_by_groups_of_at_least_four_that_divide_the_channels():
    widths = {512: 32, 64: 16, 8: 2, 50: 10, 13: 1, 3: 1}
    norms = nn.Sequential(*map(nn.BatchNorm2d, widths))
    replace_modules(norms, "group")
    assert [norm.num_groups for norm in norms] == list(widths.values())
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), nn.BatchNorm2d(8))
    replace_modules(module, "group")
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(module(images), torch.cat([module(image[None]) for image in images]))


@pytest.fixture
def deterministic(device):
    """A device on which only deterministic kernels are allowed."""
    torch.use_deterministic_algorithms(True)
    yield device
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (13, 32)])
def test_deterministic_pooling_has_the_means_and_gradients_of_torch(deterministic, sides, parts):
    maps = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.adaptive_avg_pool2d(maps, parts)
    ours = maps.detach().to(deterministic).requires_grad_()
    found = Pool(parts)(ours)
    torch.testing.assert_close(found.cpu(), expected)
    pull = torch.randn_like(expected)
    expected.backward(pull)
    found.backward(pull.to(deterministic))
    torch.testing.assert_close(ours.grad.cpu(), maps.grad)
    low = Pool(parts)(maps.detach().to(deterministic, torch.bfloat16))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double().cpu(), expected, rtol=0, atol=0.02)
