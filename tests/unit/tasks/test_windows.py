import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pdvit.tasks import windows
from pdvit.tasks.windows import SlidingWindowConfig, pixel_logits, slide


def network(classes: int = 3, shrink: int = 1) -> nn.Module:
    """A network that sees beyond each pixel, so that windows differ from the whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=shrink, padding=2), nn.Tanh(), nn.Conv2d(4, classes, 3, padding=1))


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def plain_loop(net: nn.Module, picture: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """The windows of mmsegmentation one after another, each at most as large as the image."""
    height, width = picture.shape[-2:]
    rows = range(max(-(-(height - window) // stride), 0) + 1)
    columns = range(max(-(-(width - window) // stride), 0) + 1)
    total, count = None, torch.zeros(1, 1, height, width)
    for row in rows:
        for column in columns:
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            part = picture[:, :, top:bottom, left:right]
            logits = F.interpolate(net(part), size=part.shape[-2:], mode="bilinear", align_corners=False)
            total = torch.zeros(1, logits.shape[1], height, width) if total is None else total
            total[:, :, top:bottom, left:right] += logits
            count[:, :, top:bottom, left:right] += 1
    return total / count


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(st.integers(16, 60), st.integers(16, 60), st.integers(8, 16), st.integers(3, 16), st.sampled_from([1, 2]))
def test_windows_give_exactly_what_a_plain_loop_gives(height, width, window, stride, shrink):
    stride = min(stride, window)
    net, picture = network(shrink=shrink), image(height, width)
    found = slide(net, picture, window, stride, batch=1)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain_loop(net, picture, window, stride))


@pytest.mark.parametrize(("window", "stride"), [(768, 256), (512, 341), (769, 513), (96, 95), (64, 64), (33, 1)])
def test_the_stride_is_kept_to_the_pixel(window, stride):
    found = []

    def seen(windows: torch.Tensor) -> torch.Tensor:
        found.extend((int(row), int(column)) for row, column in windows[:, :2, 0, 0])
        return windows[:, :1] * 1.0

    sides = window + 2 * stride, window
    grid = torch.stack(torch.meshgrid(*(torch.arange(side) for side in sides), indexing="ij")).float()
    slide(seen, torch.cat([grid, grid[:1]])[None], window, stride, batch=2)
    assert found == [(0, 0), (stride, 0), (2 * stride, 0)]


@torch.no_grad()
def test_several_windows_at_a_time_change_rounding_only():
    net, picture = network(), image(40, 55)
    one, four = (slide(net, picture, 16, 11, batch) for batch in (1, 4))
    torch.testing.assert_close(one, four, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(10, 14), (10, 30), (30, 10), (1, 1)])
def test_an_image_smaller_than_the_window_is_filled_up_right_and_bottom(height, width):
    net, picture = network(), image(height, width)
    found = slide(net, picture, 16, 8, 1)
    filled = F.pad(picture, (0, max(0, 16 - width), 0, max(0, 16 - height)))
    assert torch.equal(found, plain_loop(net, filled, 16, 8)[..., :height, :width])


def test_windows_do_not_change_what_the_network_keeps():
    kept = torch.ones(1, 2, 8, 8)
    slide(lambda windows: kept, image(12, 12), 8, 4, 1)
    assert torch.equal(kept, torch.ones(1, 2, 8, 8))


def test_low_precision_is_added_up_in_float32():
    found = slide(lambda windows: torch.full_like(windows, 1 / 3, dtype=torch.bfloat16), image(24, 24), 8, 4, 1)
    assert found.dtype == torch.float32
    # in bfloat16 the mean of four would not be the number again
    torch.testing.assert_close(found, torch.full_like(found, float(torch.tensor(1 / 3).bfloat16())), rtol=0, atol=1e-7)


@torch.no_grad()
def test_whole_images_go_through_at_once_and_too_large_ones_in_windows(monkeypatch):
    net, picture, how = network(shrink=2), image(20, 33), SlidingWindowConfig("whole", 16, 8)
    whole = F.interpolate(net(picture), size=(20, 33), mode="bilinear", align_corners=False)
    assert torch.equal(pixel_logits(net, picture, how), whole)
    assert not how.too_large(20, 33)
    monkeypatch.setattr(windows, "WHOLE", 600)
    assert how.too_large(20, 33)
    assert not how.too_large(20, 30)
    assert torch.equal(pixel_logits(net, picture, how), slide(net, picture, 16, 8, 1))


@torch.no_grad()
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_whole_image_that_does_not_fit_in_memory_is_taken_in_windows(error):
    net, picture = network(), image(20, 33)

    def small(images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] > 16:
            raise error
        return net(images)

    assert torch.equal(pixel_logits(small, picture, SlidingWindowConfig("whole", 16, 8)), slide(net, picture, 16, 8, 1))


def test_another_fault_of_a_whole_image_is_not_taken_for_a_lack_of_memory():
    def broken(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"):
        pixel_logits(broken, image(20, 33), SlidingWindowConfig("whole", 16, 8))
