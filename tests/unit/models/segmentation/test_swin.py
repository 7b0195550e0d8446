"""Swin's attention against a plain one, written with loops: pad, roll, and a mask by regions."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from pdvit.models.segmentation.swin import pad_before_roll

TINY = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "num_classes": 0}


def swin(size=64, name="swin_tiny_patch4_window7_224", **more):
    torch.manual_seed(0)
    options = {"dynamic_img_size": True, "always_partition": True}
    model = timm.create_model(name, img_size=size, **TINY, **options | more).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


def plain_attention(block, x):
    """Attend within windows, one query at a time: what arXiv 2103.14030 describes, with padding before the shift."""
    (height, width), (window, _), (shift, _) = x.shape[1:3], block.window_size, block.shift_size
    down, right = -height % window, -width % window
    x = F.pad(x, (0, 0, 0, right, 0, down))
    x = torch.roll(x, (-shift, -shift), (1, 2))
    full = x.shape[1:3]

    def region(at, side):  # after the roll, the last window of each axis holds tokens of two ends of the image
        return 0 if at < side - window else 1 if at < side - shift else 2

    attn, out = block.attn, torch.zeros_like(x)
    heads = attn.num_heads
    qkv = attn.qkv(x).unflatten(-1, (3, heads, -1))
    for top in range(0, full[0], window):
        for left in range(0, full[1], window):
            cells = [(top + i, left + j) for i in range(window) for j in range(window)]
            for row, column in cells:
                query = qkv[:, row, column, 0] * attn.scale
                scores = []
                for other_row, other_column in cells:
                    score = (query * qkv[:, other_row, other_column, 1]).sum(-1)
                    offset = (row - other_row + window - 1) * (2 * window - 1) + column - other_column + window - 1
                    score = score + attn.relative_position_bias_table[offset]
                    mine = (region(row, full[0]), region(column, full[1]))
                    theirs = (region(other_row, full[0]), region(other_column, full[1]))
                    scores.append(score - 100.0 * (shift > 0 and mine != theirs))
                shares = torch.stack(scores, -1).softmax(-1)
                values = torch.stack([qkv[:, r, c, 2] for r, c in cells], -2)
                out[:, row, column] = attn.proj((shares.unsqueeze(-1) * values).sum(-2).flatten(1))
    return torch.roll(out, (shift, shift), (1, 2))[:, :height, :width]


def blocks(model):
    return [block for stage in getattr(model, "stages", None) or model.layers for block in stage.blocks]


@pytest.mark.parametrize("size", [(6, 9), (3, 5), (8, 8), (5, 4)])
@torch.no_grad()
def test_attention_is_that_of_the_original_at_every_size(size):
    model = swin()
    pad_before_roll(model)
    for block in blocks(model)[:2]:  # without and with a shift
        tokens = torch.randn(2, *size, 8)
        torch.testing.assert_close(block._attn(tokens), plain_attention(block, tokens), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_timm_alone_differs_where_windows_do_not_fit():
    block, tokens = blocks(swin())[1], torch.randn(1, 6, 9, 8)
    assert (block._attn(tokens) - plain_attention(block, tokens)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
@torch.no_grad()
def test_at_multiples_of_the_window_it_is_timm_to_the_bit(name):
    model = swin(name=name)
    ours = copy.deepcopy(model)
    pad_before_roll(ours)
    images = torch.randn(1, 3, 64, 96)  # 16x24 and 8x12 tokens
    assert torch.equal(ours(images), model(images))
    odd = torch.randn(1, 3, 72, 88)
    assert not torch.allclose(ours(odd), model(odd), atol=1e-3)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
@torch.no_grad()
def test_what_stands_at_one_border_does_not_reach_the_other(name):
    # One block with shifted windows: 9 rows, windows of 4; the first row is never in a window of the last.
    model = swin(name=name)
    pad_before_roll(model)
    block = blocks(model)[1]
    block.eval()
    tokens = torch.randn(1, 9, 9, 8)
    changed = tokens.clone()
    changed[:, -1] += 5
    forward = block._shifted_window_attn if name.startswith("swinv2_cr") else block._attn
    assert torch.allclose(forward(tokens)[:, 0], forward(changed)[:, 0], atol=1e-5)


def test_copies_keep_it_and_other_models_stay_as_they_are():
    model = swin()
    pad_before_roll(model)
    copied = copy.deepcopy(model)
    assert all(type(mine) is type(theirs) for mine, theirs in zip(blocks(copied), blocks(model), strict=True))
    assert model.state_dict().keys() == swin().state_dict().keys()
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=8, num_heads=1, num_classes=0)
    kinds = [type(part) for part in vit.modules()]
    pad_before_roll(vit)
    assert [type(part) for part in vit.modules()] == kinds
