import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pdvit.tasks import views, windows
from pdvit.tasks.views import SCALES, resized_rows, score_parts, tiles
from pdvit.tasks.windows import SlidingWindowConfig, resize


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.Tanh(), nn.Conv2d(4, classes, 1))


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def gathered(net: nn.Module, picture: torch.Tensor, size: tuple[int, int], how: SlidingWindowConfig, classes: int = 3):
    """Put the parts together, and count how often each pixel came."""
    scores, times = torch.zeros(classes, *size), torch.zeros(size)
    for top, left, part in score_parts(net, picture, size, classes, how):
        place = slice(top, top + part.shape[1]), slice(left, left + part.shape[2])
        scores[(slice(None), *place)] += part
        times[place] += 1
    assert bool((times == 1).all()), "each pixel once"
    return scores


@torch.no_grad()
def test_scores_of_one_view_are_logits_at_the_size_of_the_mask():
    net, picture = network(), image(20, 30)
    at_image = F.interpolate(net(picture), size=(20, 30), mode="bilinear", align_corners=False)
    at_mask = F.interpolate(at_image, size=(27, 41), mode="bilinear", align_corners=False)
    assert torch.equal(gathered(net, picture, (27, 41), SlidingWindowConfig("whole", 16, 8)), at_mask[0])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_scales_and_flips_are_averaged_as_probabilities(mode):
    net, picture, size = network(), image(21, 30), (27, 41)
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
        resized_rows(maps, (rows, columns), range(start, min(start + block, rows))) for start in range(0, rows, block)
    ]
    torch.testing.assert_close(torch.cat(parts, 2), resize(maps, (rows, columns)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how", [SlidingWindowConfig("whole", 16, 8), SlidingWindowConfig("whole", 16, 8, scales=(0.5, 1.5), flip=True)]
)
def test_what_fits_not_at_once_comes_in_blocks_with_the_same_scores(monkeypatch, how):
    net, picture = network(), image(20, 30)
    expected = gathered(net, picture, (27, 41), how)
    monkeypatch.setattr(views, "BLOCK", 3 * 41 * 4)
    assert all(part.scores.numel() <= views.BLOCK for part in score_parts(net, picture, (27, 41), 3, how))
    torch.testing.assert_close(gathered(net, picture, (27, 41), how), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "mask"), [((64, 80), (64, 80)), ((64, 80), (71, 93)), ((64, 80), (40, 200))])
def test_a_huge_map_is_made_of_tiles_that_see_what_is_around_them(monkeypatch, size, mask):
    net, picture, how = network(), resize(image(8, 10), size), SlidingWindowConfig("slide", 16, 8)
    expected = gathered(net, picture, mask, how)
    monkeypatch.setattr(views, "MAP", 3 * 2000)
    rows, columns = tiles(size, mask, 3, how)
    assert len(rows) > 1
    assert len(columns) > 1
    found = gathered(net, picture, mask, how)
    agree = (found.argmax(0) == expected.argmax(0)).float().mean()
    assert agree > 0.9  # the windows lie elsewhere


@pytest.mark.parametrize(
    ("size", "mask", "classes", "scales", "fits"),
    [
        ((512, 683), (1536, 2048), 150, SCALES, True),  # only the image is scaled, the mask never
        ((512, 683), (2304, 3200), 150, SCALES, False),
        ((1024, 2048), (1024, 2048), 150, (1.0,), True),
        ((1024, 2048), (1024, 2048), 150, SCALES, True),
        ((1536, 2048), (1536, 2048), 150, SCALES, False),
        ((1536, 2048), (512, 683), 150, SCALES, False),
    ],
)
def test_an_image_is_tiled_where_a_map_of_image_or_mask_has_more_than_a_thousand_million_scores(
    size, mask, classes, scales, fits
):
    largest = max(max(scales) ** 2 * math.prod(size), math.prod(mask))
    assert (classes * largest < 1.05e9) == fits, "the documented limit"
    rows, columns = tiles(size, mask, classes, SlidingWindowConfig("whole", 512, 341, scales=scales))
    assert (len(rows) == len(columns) == 1) == fits


@settings(max_examples=200, deadline=None)
@given(*(st.integers(1, 300) for _ in range(4)), st.integers(1, 50), st.integers(1, 64), st.integers(200, 10**6))
def test_tiles_cover_a_mask_once_and_lie_inside_of_what_is_seen(height, width, rows, columns, classes, window, most):
    before, views.MAP = views.MAP, most
    try:
        found = tiles((height, width), (rows, columns), classes, SlidingWindowConfig("slide", window, window))
        for sides, length in zip(found, (rows, columns), strict=True):
            assert [side.begin for side in sides] == [0, *(side.end for side in sides[:-1])]
            assert sides[-1].end == length
            for side in sides:
                assert side.at <= side.begin < side.end <= side.at + side.length
                assert 0 <= side.first < side.last
    finally:
        views.MAP = before
