import pytest
import torch
from torch import nn

from pdvit.models.segmentation.heads import Pool, deterministic_pool, replace_modules


@pytest.fixture
def deterministic(device):
    """A device of which only deterministic kernels are asked for."""
    torch.use_deterministic_algorithms(True)
    yield device
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (6, 7), (13, 32)])
def test_products_give_the_means_and_gradients_of_torch(deterministic, sides, parts):
    maps = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.adaptive_avg_pool2d(maps, parts)
    ours = maps.detach().to(deterministic).requires_grad_()
    found = Pool(parts)(ours)
    torch.testing.assert_close(found.cpu(), expected)
    pull = torch.randn_like(expected)
    expected.backward(pull)
    found.backward(pull.to(deterministic))
    torch.testing.assert_close(ours.grad.cpu(), maps.grad)


def test_products_in_bfloat16_are_near(deterministic):
    maps = torch.randn(2, 3, 13, 32)
    found = Pool(3)(maps.to(deterministic, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    expected = nn.functional.adaptive_avg_pool2d(maps, 3)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=0.01)


def test_it_is_torch_s_own_unless_deterministic_kernels_are_asked_for():
    module = nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.ReLU()), nn.Conv2d(2, 2, 1))
    maps, names = torch.randn(1, 2, 7, 8), list(module.state_dict())
    assert not torch.are_deterministic_algorithms_enabled()
    expected = module(maps)
    replace_modules(module, deterministic_pool)
    assert isinstance(module[0][0], Pool)
    assert torch.equal(module(maps), expected)
    assert list(module.state_dict()) == names
