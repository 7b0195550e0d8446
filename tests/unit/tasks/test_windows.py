import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.tasks import windows
from pdvit.tasks.windows import (
    SCALES,
    SlidingWindowConfig,
    pixel_logits,
    resize,
    resize_rows,
    score_rows,
    slide,
)


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
    monkeypatch.setattr(windows, "MAX_WHOLE", 600)
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


@torch.no_grad()
def gathered(net: nn.Module, picture: torch.Tensor, size: tuple[int, int], how: SlidingWindowConfig, classes: int = 3):
    """Put the blocks together; each row comes once, from top to bottom."""
    rows, parts = zip(*score_rows(net, picture, size, classes, how), strict=True)
    assert list(rows) == [sum(part.shape[1] for part in parts[:number]) for number in range(len(parts))]
    return torch.cat(parts, 1)


@torch.no_grad()
def test_scores_of_one_view_are_logits_at_the_size_of_the_mask():
    net, picture = network(shrink=2), image(20, 30)
    at_image = F.interpolate(net(picture), size=(20, 30), mode="bilinear", align_corners=False)
    at_mask = F.interpolate(at_image, size=(27, 41), mode="bilinear", align_corners=False)
    assert torch.equal(gathered(net, picture, (27, 41), SlidingWindowConfig("whole", 16, 8)), at_mask[0])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_scales_and_flips_are_averaged_as_probabilities(mode):
    net, picture, size = network(shrink=2), image(21, 30), (27, 41)
    mean = torch.zeros(3, *size, dtype=torch.float64)
    for scale in SCALES:
        for flip in (False, True):
            inside = int(21 * scale + 0.5), int(30 * scale + 0.5)
            seen = F.interpolate(picture, size=inside, mode="bilinear", align_corners=False)
            seen = torch.flip(seen, [3]) if flip else seen
            if mode == "slide":
                logits = windows.slide(net, seen, 16, 8, 1)
            else:
                logits = F.interpolate(net(seen), size=inside, mode="bilinear", align_corners=False)
            logits = torch.flip(logits, [3]) if flip else logits
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            mean += logits[0].double().softmax(0) / 12
    found = gathered(net, picture, size, SlidingWindowConfig(mode, 16, 8, scales=SCALES, flip=True))
    torch.testing.assert_close(found.exp().double(), mean, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_blocks_of_rows_are_those_of_the_resized_whole(height, width, rows, columns, block):
    maps = image(height, width)
    parts = [
        resize_rows(maps, (rows, columns), range(start, min(start + block, rows))) for start in range(0, rows, block)
    ]
    torch.testing.assert_close(torch.cat(parts, 2), resize(maps, (rows, columns)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how", [SlidingWindowConfig("whole", 16, 8), SlidingWindowConfig("whole", 16, 8, scales=(0.5, 1.5), flip=True)]
)
def test_what_fits_not_at_once_comes_in_blocks_with_the_same_scores(monkeypatch, how):
    net, picture = network(shrink=2), image(20, 30)
    expected = gathered(net, picture, (27, 41), how)
    monkeypatch.setattr(windows, "MAX_BLOCK", 3 * 41 * 4)
    assert all(part.numel() <= windows.MAX_BLOCK for _, part in score_rows(net, picture, (27, 41), 3, how))
    torch.testing.assert_close(gathered(net, picture, (27, 41), how), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "mask", "scales", "fits"),
    [
        ((20, 30), (20, 30), (1.0,), True),
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
