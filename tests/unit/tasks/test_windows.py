from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.tasks import windows
from pdvit.tasks.windows import SCALES, SlidingWindowConfig, pixel_logits, score_rows, slide

WHOLE = SlidingWindowConfig("whole", 16, 8)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def network(classes: int = 3, shrink: int = 1) -> nn.Module:
    """A network that sees beyond each pixel, so that windows differ from the whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=shrink, padding=2), nn.Tanh(), nn.Conv2d(4, classes, 3, padding=1))


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def bilinear(maps: torch.Tensor, size) -> torch.Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def mmsegmentation_loop(net: nn.Module, picture: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """The windows of mmsegmentation one after another; a smaller image is padded first."""
    height, width = picture.shape[-2:]
    picture = F.pad(picture, (0, max(0, window - width), 0, max(0, window - height)))
    bottom, right = picture.shape[-2:]
    rows = range(max(-(-(bottom - window) // stride), 0) + 1)
    columns = range(max(-(-(right - window) // stride), 0) + 1)
    total, count = None, torch.zeros(1, 1, bottom, right)
    for row in rows:
        for column in columns:
            y2, x2 = min(row * stride + window, bottom), min(column * stride + window, right)
            y1, x1 = max(y2 - window, 0), max(x2 - window, 0)
            part = picture[:, :, y1:y2, x1:x2]
            logits = bilinear(net(part), part.shape[-2:])
            total = torch.zeros(1, logits.shape[1], bottom, right) if total is None else total
            total[:, :, y1:y2, x1:x2] += logits
            count[:, :, y1:y2, x1:x2] += 1
    return (total / count)[..., :height, :width]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(8, 16), st.integers(1, 16), st.sampled_from([1, 2]))
def test_windows_equal_the_loop_of_mmsegmentation(height, width, window, stride, shrink):
    stride = min(stride, window)
    with torch.no_grad():
        net, picture = network(shrink=shrink), image(height, width)
        found = slide(net, picture, window, stride, batch=1)
        assert found.dtype == torch.float32
        assert torch.equal(found, mmsegmentation_loop(net, picture, window, stride))
        # The rounding of a convolution depends on its batch, so here it has none: all its numbers are integers.
        net[1], picture = nn.ReLU(), picture.mul(4).round()
        for weight in net.parameters():
            weight.copy_(weight.mul(16).round())
        assert torch.equal(*(slide(net, picture, window, stride, batch=size) for size in (1, 4)))


def test_logits_are_added_up_in_float32():
    kept = torch.full((1, 2, 8, 8), 1 / 3, dtype=torch.bfloat16)
    found = slide(lambda parts: kept, image(24, 24), 8, 4, 1)
    assert found.dtype == torch.float32
    # in bfloat16 the mean of four would not be the number again
    torch.testing.assert_close(found, torch.full_like(found, float(kept[0, 0, 0, 0])), rtol=0, atol=1e-7)


def test_whole_images_take_one_pass_and_too_large_ones_windows(monkeypatch):
    net, picture, cublas = network(shrink=2), image(20, 33), "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"
    found, in_windows = pixel_logits(net, picture, WHOLE)
    assert not in_windows
    assert torch.equal(found, bilinear(net(picture), (20, 33)))

    def small(images: torch.Tensor, error: Exception | None = None) -> torch.Tensor:
        if error and images.shape[-1] > 16:
            raise error
        return net(images)

    with pytest.raises(RuntimeError, match="do not fit"):
        pixel_logits(partial(small, error=RuntimeError("shapes do not fit")), picture, WHOLE)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(f"CUDA error: {cublas}"), None):
        if error is None:
            monkeypatch.setattr(windows, "MAX_WHOLE", 20 * 33 - 1)
        found, in_windows = pixel_logits(partial(small, error=error), picture, WHOLE)
        assert in_windows
        assert torch.equal(found, slide(net, picture, 16, 8, 1))


def gathered(net: nn.Module, picture: torch.Tensor, size: tuple[int, int], config: SlidingWindowConfig):
    """Put the blocks together; each row comes once, from top to bottom."""
    rows, parts, _ = zip(*score_rows(net, picture, size, 3, config), strict=True)
    assert list(rows) == [sum(part.shape[1] for part in parts[:number]) for number in range(len(parts))]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_scales_and_flips_are_averaged_as_probabilities(mode):
    net, picture, size = network(shrink=2), image(21, 30), (27, 41)
    mean = torch.zeros(3, *size, dtype=torch.float64)
    for scale in SCALES:
        for flip in (False, True):
            scaled = int(21 * scale + 0.5), int(30 * scale + 0.5)
            view = bilinear(picture, scaled)
            view = torch.flip(view, [3]) if flip else view
            logits = slide(net, view, 16, 8, 1) if mode == "slide" else bilinear(net(view), scaled)
            logits = torch.flip(logits, [3]) if flip else logits
            mean += bilinear(logits, size)[0].double().softmax(0) / 12
    found = gathered(net, picture, size, SlidingWindowConfig(mode, 16, 8, scales=SCALES, flip=True))
    torch.testing.assert_close(found.exp().double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [WHOLE, SlidingWindowConfig("whole", 16, 8, scales=(0.5, 1.5), flip=True)])
def test_large_maps_come_in_blocks_with_the_same_scores(monkeypatch, config):
    net, picture = network(shrink=2), image(20, 30)
    expected = gathered(net, picture, (27, 41), config)
    monkeypatch.setattr(windows, "MAX_BLOCK", 3 * 41 * 4)
    assert all(part.numel() <= windows.MAX_BLOCK for _, part, _ in score_rows(net, picture, (27, 41), 3, config))
    torch.testing.assert_close(gathered(net, picture, (27, 41), config), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "mask", "scales", "fits"),
    [
        ((20, 30), (60, 90), (1.0,), True),  # a single view is resized block by block
        ((20, 30), (60, 90), (0.5, 1.0), False),
        ((20, 30), (20, 30), (1.0, 1.75), False),
        ((60, 90), (20, 30), (1.0,), False),
    ],
)
def test_a_map_of_too_many_scores_is_an_error(monkeypatch, size, mask, scales, fits):
    monkeypatch.setattr(windows, "MAX_SCORES", 3 * 20 * 30)
    config = SlidingWindowConfig("slide", 16, 8, scales=scales)
    if fits:
        assert gathered(network(), image(*size), mask, config).shape == (3, *mask)
    else:
        with pytest.raises(UserError, match="more than 1,800 scores"):
            gathered(network(), image(*size), mask, config)
