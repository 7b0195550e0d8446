"""Swin's attention against a plain one, written with loops: pad, roll, and a mask by regions."""

import copy
from itertools import product

import pytest
import timm
import torch
from torch.nn import functional as F

from pdvit.models.segmentation.segmenter import pad_before_roll
from tests.unit.models.support import make

TINY = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "num_classes": 0}
TINY |= {"img_size": 64, "dynamic_img_size": True, "always_partition": True}
NAMES = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"]


def swins(name=NAMES[0]):
    """Return a small model as timm makes it, and a padded copy."""
    model = make(name, **TINY)
    padded = copy.deepcopy(model)
    pad_before_roll(padded)
    return model, padded


def plain_attention(block, x):
    """Attend within windows, one query at a time: as in arXiv 2103.14030, with padding before the shift."""
    (height, width), (window, _), (shift, _) = x.shape[1:3], block.window_size, block.shift_size
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    x = torch.roll(x, (-shift, -shift), (1, 2))
    full = x.shape[1:3]

    def region(at, side):  # after the roll, the last window of each axis holds tokens of two ends of the image
        return 0 if at < side - window else 1 if at < side - shift else 2

    attn, out = block.attn, torch.zeros_like(x)
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    for top, left in product(range(0, full[0], window), range(0, full[1], window)):
        cells = [(top + i, left + j) for i in range(window) for j in range(window)]
        regions = {cell: tuple(map(region, cell, full)) for cell in cells}
        for row, column in cells:
            query, scores = qkv[:, row, column, 0] * attn.scale, []
            for other_row, other_column in cells:
                score = (query * qkv[:, other_row, other_column, 1]).sum(-1)
                offset = (row - other_row + window - 1) * (2 * window - 1) + column - other_column + window - 1
                score = score + attn.relative_position_bias_table[offset]
                apart = regions[row, column] != regions[other_row, other_column]
                scores.append(score - 100.0 * (shift > 0 and apart))
            weights = torch.stack(scores, -1).softmax(-1)
            values = torch.stack([qkv[:, r, c, 2] for r, c in cells], -2)
            out[:, row, column] = attn.proj((weights.unsqueeze(-1) * values).sum(-2).flatten(1))
    return torch.roll(out, (shift, shift), (1, 2))[:, :height, :width]


def blocks(model):
    return [block for stage in getattr(model, "stages", None) or model.layers for block in stage.blocks]


@pytest.mark.parametrize("size", [(6, 9), (3, 5), (8, 8)])
@torch.no_grad()
def test_attention_is_that_of_the_original_at_every_size(size):
    theirs, ours = map(blocks, swins())
    tokens = torch.randn(2, *size, 8)
    for block in ours[:2]:  # without and with a shift
        expected = plain_attention(block, tokens)
        torch.testing.assert_close(block._attn(tokens), expected, atol=2e-5, rtol=1e-4)
    if size == (6, 9):  # windows do not fit: timm alone differs
        assert (theirs[1]._attn(tokens) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_at_multiples_of_the_window_it_is_timm_to_the_bit(name):
    model, ours = swins(name)
    images = torch.randn(1, 3, 64, 96)  # 16x24 and 8x12 tokens
    assert torch.equal(ours(images), model(images))
    odd = torch.randn(1, 3, 72, 88)
    assert not torch.allclose(ours(odd), model(odd), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tokens_at_one_border_do_not_reach_the_other(name):
    # One block with shifted windows: 9 rows, windows of 4; the first row is never in a window of the last.
    block = blocks(swins(name)[1])[1].eval()
    tokens = torch.randn(1, 9, 9, 8)
    changed = tokens.clone()
    changed[:, -1] += 5
    forward = block._shifted_window_attn if name.startswith("swinv2_cr") else block._attn
    assert torch.allclose(forward(tokens)[:, 0], forward(changed)[:, 0], atol=1e-5)


def test_copies_keep_it_and_other_models_stay_as_they_are():
    model, ours = swins()
    copied = copy.deepcopy(ours)
    assert [type(block) for block in blocks(copied)] == [type(block) for block in blocks(ours)]
    assert [type(block) for block in blocks(ours)] != [type(block) for block in blocks(model)]
    assert ours.state_dict().keys() == model.state_dict().keys()
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=8, num_heads=1, num_classes=0)
    before = [type(part) for part in vit.modules()]
    pad_before_roll(vit)
    assert [type(part) for part in vit.modules()] == before
