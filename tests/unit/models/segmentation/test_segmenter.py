import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pdvit.config.schema import DataConfig
from pdvit.errors import UserError
from pdvit.models.segmentation.segmenter import build_segmenter
from tests.unit.data.batches import OnGpu
from tests.unit.models.segmentation.models import FAMILIES, NONE, SWIN, SWIN_SIZES, VIT, build, config, images

TERMS = replace(NONE, cosine=1.0, contrastive=1.0)
vit_and_swin = pytest.mark.parametrize("name", [VIT, SWIN])
both_heads = pytest.mark.parametrize("head", ["upernet", "linear"])


def millions(module):
    return round(sum(weight.numel() for weight in module.parameters()) / 1e6, 2)


def test_upernet_with_swin_tiny_has_the_size_and_cost_that_mmsegmentation_states():
    # The cost: multiplications of convolutions and matrix products, half of the operations that torch counts, for one
    # image in evaluation, so without the auxiliary head.
    with torch.device("meta"):
        segmenter = build_segmenter(config(SWIN, model={}, crop=512, width=512), 150).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            segmenter(torch.empty(1, 3, 512, 2048))
    assert millions(segmenter) == 59.94
    assert millions(segmenter.head.aux) == 0.92
    assert round(counter.get_total_flops() / 2 / 1e9, 1) == 944.4


@both_heads
def test_heads_read_channels_last_on_a_gpu_alone(head):
    segmenter, found = build(VIT, head, crop=64).eval(), []
    segmenter.head.register_forward_pre_hook(lambda _, inputs: found.extend(inputs[0]))
    expected = segmenter(images(2, 64, 64)).logits
    assert all(part.is_contiguous() for part in found)
    found.clear()
    logits = segmenter(images(2, 64, 64).as_subclass(OnGpu)).logits.as_subclass(torch.Tensor)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in found)


@both_heads
@pytest.mark.parametrize(
    "name", [name if name in (VIT, SWIN) else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_weight_learns(name, head):
    segmenter = build(name, head, crop=64, diversity=TERMS).train()
    output = segmenter(images(2, 64, 64))
    assert (output.aux is None) == (head == "linear")
    loss = output.logits.sum() + (0 if output.aux is None else output.aux.sum())
    loss.backward()
    assert [name for name, weight in segmenter.named_parameters() if weight.grad is None] == []
    assert output.first.shape == output.last.shape
    assert output.logits.shape[:2] == (2, 5)
    if head == "upernet":
        stride = 64 / output.logits.shape[-1]
        assert stride == {VIT: 2, "vit_small_patch14_dinov2": 64 / 20}.get(name, 4)


@pytest.mark.parametrize(("name", "head", "multiple"), [(VIT, "upernet", 8), (VIT, "linear", 8), (SWIN, "upernet", 4)])
@pytest.mark.parametrize(("height", "width"), [(30, 21), (9, 13), (5, 100)])
@torch.no_grad()
def test_padding_is_zeros_below_and_to_the_right_and_its_logits_are_cut_off(name, head, multiple, height, width):
    segmenter, small = build(name, head, crop=64).eval(), images(1, height, width)
    padded = F.pad(small, (0, -width % multiple, 0, -height % multiple))
    expected = F.interpolate(segmenter(padded).logits, padded.shape[2:], mode="bilinear", align_corners=False)
    assert torch.equal(segmenter.resize(segmenter(small).logits, (height, width)), expected[..., :height, :width])


@torch.no_grad()
def test_a_backbone_of_one_size_takes_smaller_images_and_refuses_larger_ones():
    segmenter = build("hiera_tiny_224", crop=64).eval()
    assert not segmenter.adapter.any_size
    assert segmenter.resize(segmenter(images(1, 20, 64)).logits, (20, 64)).shape == (1, 5, 20, 64)
    with pytest.raises(UserError, match=r"(?s)images of 64x64 only.*eval-mode slide"):
        segmenter(images(1, 65, 64))


@torch.no_grad()
def test_the_linear_head_classifies_the_tokens_after_the_final_norm():
    segmenter = build(head="linear").eval()
    tokens = segmenter.backbone.forward_features(images())[:, segmenter.backbone.num_prefix_tokens :]
    classifier = segmenter.head.classifier
    expected = tokens @ classifier.weight[:, :, 0, 0].T + classifier.bias
    torch.testing.assert_close(segmenter(images()).logits.flatten(2).transpose(1, 2), expected)


@both_heads
@torch.no_grad()
def test_logits_of_a_fresh_head_differ_between_classes(head):
    """Else a small model learns what is an object, and for long not which."""
    segmenter = build(head=head, classes=64)
    for classifier in [segmenter.head.classifier, *([segmenter.head.aux[-1]] if head == "upernet" else [])]:
        inputs = torch.randn(16, classifier.in_channels, 8, 8)
        assert 0.4 < classifier(inputs).std() < 0.9  # uniform within 1 / sqrt(width): sqrt(1 / 3), and the bias


def test_the_maps_are_those_of_the_quarters_of_the_blocks():
    segmenter = build(model=FAMILIES[VIT] | {"depth": 7}).eval()
    assert segmenter.adapter.indices == (1, 3, 5, 6)
    seen = []
    for at in segmenter.adapter.indices:
        segmenter.backbone.blocks[at].register_forward_hook(lambda *values: seen.append(values[2]))
    maps = segmenter.adapter.maps(segmenter.backbone, images())
    for found, tokens in zip(maps, seen, strict=True):
        assert torch.equal(found.flatten(2).transpose(1, 2), tokens[:, 1:])
    twelve = build(model=FAMILIES[VIT] | {"depth": 12})
    assert twelve.adapter.indices == (2, 5, 8, 11)  # mmsegmentation's for a ViT of 12 blocks


@pytest.mark.parametrize("crop", [64, *(pytest.param(crop, marks=pytest.mark.slow) for crop in (100, 224))])
def test_swin_shifts_its_windows_in_the_last_stage_at_every_crop(crop):
    segmenter = build(SWIN, crop=crop, model={"args": SWIN_SIZES | {"window_size": 7}})
    last = pickle.loads(pickle.dumps(segmenter)).backbone.layers[-1].blocks
    assert [(block.window_size, block.shift_size) for block in last] == [((7, 7), (0, 0)), ((7, 7), (3, 3))]


@pytest.mark.parametrize(
    ("name", "stages"), [(VIT, [("", 4)]), (SWIN, [(f"layers.{at}.", depth) for at, depth in enumerate([2, 1, 1, 2])])]
)
def test_layer_decay_reaches_every_block_and_leaves_the_head(name, stages):
    segmenter = build(name, crop=64)
    names = {weight: name for name, weight in segmenter.named_parameters()}
    groups = param_groups_layer_decay(segmenter, layer_decay=0.5)
    scales = {names[weight]: group["lr_scale"] for group in groups for weight in group["params"]}
    assert scales.keys() == set(names.values())
    assert {scale for name, scale in scales.items() if name.startswith("head.")} == {1.0}
    blocks = [f"backbone.{stage}blocks.{at}." for stage, depth in stages for at in range(depth)]
    by_block = [{scales[name] for name in scales if name.startswith(block)} for block in blocks]
    assert by_block == [{0.5 ** (len(blocks) - at)} for at in range(len(blocks))]
    stem = {scales[name] for name in scales if name.startswith("backbone.patch_embed")}
    assert stem == {0.5 ** (len(blocks) + 1)}


def test_weight_decay_spares_positions_and_swins_tables():
    spared = build(SWIN, crop=64).no_weight_decay()
    assert "backbone.layers.0.blocks.0.attn.relative_position_bias_table" in spared
    assert "backbone.pos_embed" in build().no_weight_decay()


def test_the_terms_see_the_tokens_of_the_chosen_layers():
    segmenter = build(diversity=replace(TERMS, cosine_layers="2")).eval()
    seen = {}
    for at in (0, 1, 3):
        segmenter.backbone.blocks[at].register_forward_hook(lambda *it, at=at: seen.update({at: it[2][:, 1:]}))
    output = segmenter(images())
    for found, at in ((output.first, 0), (output.last, 3), (*output.others, 1)):
        assert torch.equal(found, seen[at])
    linear = build(head="linear", diversity=TERMS).eval()
    torch.testing.assert_close(linear(images()).last, linear.backbone.forward_features(images())[:, 1:])


def test_without_a_crop_the_size_is_the_image_size_or_the_models_own():
    unset = config(crop=None)
    assert build_segmenter(replace(unset, data=DataConfig(img_size=40)), 2).segment.crop == 40
    assert build(crop=None).segment.crop == 224
    assert build(crop=33).adapter.size == (40, 40)  # what its patches fit


REASONS = {"resnet18": "no layout for its class", "vit_of_nobody": "no model named"}
REASONS |= {"pit_ti_224": "3 maps of different sizes.*--head linear"}


@pytest.mark.parametrize(("name", "what"), REASONS.items())
def test_backbones_without_maps_are_refused_with_a_reason(name, what):
    with pytest.raises(UserError, match=f"(?s){what}"):
        build(name, crop=224)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@vit_and_swin
def test_compiled_it_is_the_same(name):
    if "swin" in name and torch.__version__.startswith("2.11"):
        pytest.skip("torch 2.11 writes C++ for Swin's shifts that no compiler takes")
    segmenter = build(name, crop=64, diversity=TERMS).eval()
    compiled = torch.compile(segmenter, fullgraph=True, dynamic=False)
    expected, found = segmenter(images(2, 64, 64)), compiled(images(2, 64, 64))
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
