import copy
import os
import pickle
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pdvit.config import Config
from pdvit.config.schema import DataConfig, DiversityConfig, ModelConfig, SegmentConfig
from pdvit.errors import UserError
from pdvit.losses import Objective
from pdvit.models.segmentation.segmenter import build_segmenter
from pdvit.models.tokens import TokenOutput
from pdvit.models.wrapper import freeze

NONE = DiversityConfig(preset="none", cosine=0.0, contrastive=0.0, mixing=0.0)
TERMS = replace(NONE, cosine=1.0, contrastive=1.0)
VIT = ("vit_tiny_patch16_224", {"depth": 4, "width": 16, "heads": 2, "patch_size": 8})
SWIN = {"embed_dim": 8, "depths": [2, 1, 1, 2], "num_heads": [1, 2, 2, 4], "window_size": 4}
# Small forms of one model per family, by the arguments that make them small.
FAMILIES = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 16},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 16, "num_heads": 2},
    "vit_small_patch14_dinov2": {"depth": 5, "embed_dim": 16, "num_heads": 2},
    "vit_small_patch16_dinov3": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    "beit_base_patch16_224": {"depth": 4, "embed_dim": 16, "num_heads": 2},
    "cait_xxs24_224": {"depth": 4, "embed_dim": 16, "num_heads": 2},
    "xcit_nano_12_p16_224": {"depth": 4, "embed_dim": 16, "num_heads": 2},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "hiera_tiny_224": {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 2]},
    "pvt_v2_b0": {"depths": [1, 1, 1, 2], "embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2]},
    "convnext_atto": {"depths": [1, 1, 1, 2], "dims": [8, 8, 16, 16]},
    "twins_svt_small": {"depths": [1, 1, 1, 2], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 2, 2, 2]},
    "volo_d1_224": {},
}
QUICK = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
SIZES = {"embed_dim": "width", "num_heads": "heads", "patch_size": "patch_size", "depth": "depth"}


def config(name=VIT[0], model=None, head="upernet", crop=32, diversity=NONE, **segment):
    model = VIT[1] if model is None and name == VIT[0] else model or {}
    section = SegmentConfig(head=head, crop=crop, **{"width": 16} | segment)
    return Config(model=ModelConfig(name=name, drop_path=0.0, **model), diversity=diversity, segment=section)


def family(name, **more):
    arguments = FAMILIES[name]
    plain = "depth" in arguments
    model = {SIZES[key]: value for key, value in arguments.items()} if plain else {"args": arguments}
    return config(name, model, crop=64, **more)


@cache
def built(options, classes):
    torch.manual_seed(0)
    return build_segmenter(options, classes)


def build(*arguments, classes=5, **options):
    """A model of its own; those of equal settings are built once."""
    return copy.deepcopy(built(config(*arguments, **options), classes))


def images(count=2, height=32, width=32):
    return torch.linspace(-1, 1, count * 3 * height * width).sin().view(count, 3, height, width)


def millions(module):
    return round(sum(weight.numel() for weight in module.parameters()) / 1e6, 2)


def test_upernet_with_swin_tiny_has_the_size_and_cost_that_mmsegmentation_states():
    # The cost: multiplications of convolutions and matrix products, half of the operations that torch counts, for one
    # image in evaluation, so without the auxiliary head.
    with torch.device("meta"):
        segmenter = build_segmenter(config("swin_tiny_patch4_window7_224", crop=512, width=512), 150).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            segmenter(torch.empty(1, 3, 512, 2048))
    assert millions(segmenter) == 59.94
    assert millions(segmenter.head.aux) == 0.92
    assert round(counter.get_total_flops() / 2 / 1e9, 1) == 944.4


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_weight_learns(name, head):
    # On the meta device, where gradients have shapes alone: whether there is one is what matters.
    with torch.device("meta"):
        segmenter = build_segmenter(family(name, head=head, diversity=TERMS), 5).train()
        output = segmenter(torch.empty(2, 3, 64, 64))
        assert (output.aux is None) == (head == "linear")
        loss = output.logits.sum() + (0 if output.aux is None else output.aux.sum())
        loss.backward()
    assert [name for name, weight in segmenter.named_parameters() if weight.grad is None] == []
    assert output.first.shape == output.last.shape
    assert output.logits.shape[:2] == (2, 5)
    if head == "upernet":
        stride = 64 / output.logits.shape[-1]
        assert stride == {"vit_small_patch14_dinov2": 64 / 20}.get(name, 4)


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize("name", [VIT[0], "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_images_of_any_size(name, head):
    segmenter = build_segmenter(config(head=head) if name == VIT[0] else family(name, head=head), 5).eval()
    for size in [(32, 32), (33, 50), (71, 40), (9, 13), (5, 100)]:
        raw = segmenter(images(1, *size)).logits
        logits = segmenter.resize(raw, size)
        assert logits.shape == (1, 5, *size)
        assert logits.isfinite().all()


@torch.no_grad()
def test_padding_is_zeros_below_and_to_the_right_and_what_covers_it_is_cut_off():
    segmenter = build().eval()
    small = images(1, 30, 21)
    padded = F.pad(small, (0, 3, 0, 2))
    expected = F.interpolate(segmenter(padded).logits, (32, 24), mode="bilinear", align_corners=False)
    assert torch.equal(segmenter.resize(segmenter(small).logits, (30, 21)), expected[..., :30, :21])


@torch.no_grad()
def test_a_backbone_of_one_size_takes_smaller_images_and_refuses_larger_ones():
    segmenter = build_segmenter(family("hiera_tiny_224"), 5).eval()
    assert not segmenter.adapter.any_size
    assert segmenter.resize(segmenter(images(1, 20, 64)).logits, (20, 64)).shape == (1, 5, 20, 64)
    with pytest.raises(UserError, match=r"(?s)images of 64x64 only.*eval-mode slide"):
        segmenter(images(1, 65, 64))


@torch.no_grad()
def test_the_linear_head_classifies_the_tokens_behind_the_final_norm():
    segmenter = build(head="linear").eval()
    tokens = segmenter.backbone.forward_features(images())[:, segmenter.backbone.num_prefix_tokens :]
    classifier = segmenter.head.classifier
    expected = tokens @ classifier.weight[:, :, 0, 0].T + classifier.bias
    logits = segmenter(images()).logits
    torch.testing.assert_close(logits.flatten(2).transpose(1, 2), expected)


@torch.no_grad()
@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_logits_of_a_fresh_head_differ_between_classes(head):
    """Else a small model learns what is an object, and for long not which."""
    torch.manual_seed(0)
    segmenter = build(head=head, width=48, classes=64)
    for classifier in [segmenter.head.classifier, *([segmenter.head.aux[-1]] if head == "upernet" else [])]:
        inputs = torch.randn(16, classifier.in_channels, 8, 8)
        assert 0.4 < classifier(inputs).std() < 0.9  # uniform within 1 / sqrt(width): sqrt(1 / 3), and the bias


def test_the_maps_are_those_of_the_quarters_of_the_blocks():
    segmenter = build(model=VIT[1] | {"depth": 7}).eval()
    assert segmenter.adapter.indices == (1, 3, 5, 6)
    seen = []
    hooks = [segmenter.backbone.blocks[at].register_forward_hook(lambda *it: seen.append(it[2])) for at in (1, 3, 5, 6)]
    maps = segmenter.adapter.maps(segmenter.backbone, images())
    for hook in hooks:
        hook.remove()
    for found, tokens in zip(maps, seen, strict=True):
        assert torch.equal(found.flatten(2).transpose(1, 2), tokens[:, 1:])
    with torch.device("meta"):
        twelve = build_segmenter(config(model=VIT[1] | {"depth": 12}), 5)
    assert twelve.adapter.indices == (2, 5, 8, 11)  # mmsegmentation's for a ViT of 12 blocks


@pytest.mark.parametrize(
    "crop", [64, pytest.param(100, marks=pytest.mark.slow), pytest.param(224, marks=pytest.mark.slow)]
)
def test_swin_shifts_its_windows_in_the_last_stage_at_every_crop(crop):
    with torch.device("meta"):
        segmenter = build_segmenter(config("swin_tiny_patch4_window7_224", crop=crop), 3)
    last = pickle.loads(pickle.dumps(segmenter)).backbone.layers[-1].blocks
    assert [(block.window_size, block.shift_size) for block in last] == [((7, 7), (0, 0)), ((7, 7), (3, 3))]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_layer_decay_reaches_every_block_and_leaves_the_head(name):
    with torch.device("meta"):
        segmenter = build_segmenter(family(name), 5)
    names = {id(weight): name for name, weight in segmenter.named_parameters()}
    scales = {
        names[id(weight)]: group["lr_scale"]
        for group in param_groups_layer_decay(segmenter, layer_decay=0.5)
        for weight in group["params"]
    }
    assert scales.keys() == set(names.values())
    assert {scale for name, scale in scales.items() if name.startswith("head.")} == {1.0}
    count = 6 if "swin" in name else FAMILIES[name]["depth"]
    stages = [f"layers.{stage}." for stage in range(4)] if "swin" in name else [""]
    depths = SWIN["depths"] if "swin" in name else [count]
    blocks = [
        f"backbone.{stage}blocks.{at}." for stage, depth in zip(stages, depths, strict=True) for at in range(depth)
    ]
    by_block = [{scales[name] for name in scales if name.startswith(block)} for block in blocks]
    assert by_block == [{0.5 ** (count - at)} for at in range(count)]
    stem = {scales[name] for name in scales if name.startswith("backbone.patch_embed")}
    assert stem == {0.5 ** (count + 1)}


def test_weight_decay_spares_positions_and_swins_tables():
    swin = build_segmenter(family("swin_tiny_patch4_window7_224"), 5)
    spared = swin.no_weight_decay()
    assert "backbone.layers.0.blocks.0.attn.relative_position_bias_table" in spared
    assert spared <= {name for name, _ in swin.named_parameters()}
    assert "backbone.pos_embed" in build().no_weight_decay()


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_a_frozen_backbone_keeps_its_weights_and_the_head_learns(head):
    segmenter = build(head=head)
    freeze(segmenter, "backbone")
    segmenter.train()
    assert not any(part.training for part in segmenter.backbone.modules())
    learning = [name for name, weight in segmenter.named_parameters() if weight.requires_grad]
    assert learning == [name for name, _ in segmenter.named_parameters() if name.startswith("head.")]
    output = segmenter(images())
    (output.logits.sum() + (0 if output.aux is None else output.aux.sum())).backward()
    assert all(weight.grad is None for weight in segmenter.backbone.parameters())


def test_the_terms_see_the_tokens_of_the_first_and_last_block():
    segmenter = build(diversity=replace(TERMS, cosine_layers="2")).eval()
    seen = {}
    for at in (0, 1, 3):
        segmenter.backbone.blocks[at].register_forward_hook(lambda *it, at=at: seen.update({at: it[2][:, 1:]}))
    output = segmenter(images())
    assert torch.equal(output.first, seen[0])
    assert torch.equal(output.last, seen[3])
    assert torch.equal(output.others[0], seen[1])
    objective = Objective(mixing=0, class_loss=lambda logits, _: logits.square().mean())
    tokens = TokenOutput(output.logits, output.first, output.last, None, output.others)
    objective(tokens, torch.zeros(2)).total.backward()
    assert segmenter.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    linear = build(head="linear", diversity=TERMS).eval()
    torch.testing.assert_close(linear(images()).last, linear.backbone.forward_features(images())[:, 1:])
    plain = build()(images())
    assert (plain.first, plain.last, plain.others) == (None, None, ())


def test_a_copy_has_its_own_tokens():
    segmenter = build(diversity=TERMS).eval()
    copied = copy.deepcopy(segmenter)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
    segmenter(images())
    assert copied(images()).last.abs().sum() == 0


def test_the_crop_is_the_image_size_where_none_is_set_and_else_the_models_own():
    unset = config(crop=None)
    assert build_segmenter(replace(unset, data=DataConfig(img_size=40)), 2).segment.crop == 40
    assert build_segmenter(config(crop=None, model={"depth": 1, "width": 16, "heads": 2}), 2).segment.crop == 224
    assert build(crop=33).adapter.size == (40, 40)  # what its patches fit


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"name": "resnet18"}, "a convolutional network has no tokens"),
        ({"name": "crossvit_tiny_240"}, "two grids"),
        ({"name": "pit_ti_224", "crop": 224}, "3 maps of different sizes.*--head linear"),
        ({"name": "vit_of_nobody"}, "no model named"),
    ],
)
def test_backbones_without_maps_are_refused_with_a_reason(options, what):
    with pytest.raises(UserError, match=f"(?s){what}"):
        build(**options)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", [VIT[0], "swin_tiny_patch4_window7_224"])
def test_compiled_it_is_the_same(name):
    options = config(diversity=TERMS) if name == VIT[0] else family(name, diversity=TERMS)
    segmenter = build_segmenter(options, 5).eval()
    compiled = torch.compile(segmenter, fullgraph=True, dynamic=False)
    expected, found = segmenter(images(2, 64, 64)), compiled(images(2, 64, 64))
    for ours, theirs in zip(found[:1] + found[2:4], expected[:1] + expected[2:4], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_backbone_that_does_not_fit_is_refused_before_it_takes_memory(monkeypatch):
    monkeypatch.setattr("pdvit.models.build.available_memory", lambda: 1000)
    with pytest.raises(UserError, match="too big for memory"):
        build_segmenter(config(), 3)
    with torch.device("meta"):  # takes no memory
        build_segmenter(config(), 3)
