"""Every family of the table, as a small instance, against views of its blocks that are written here by hand."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.models.davit import DaVit
from timm.models.focalnet import FocalNet
from timm.models.gcvit import GlobalContextVit
from timm.models.hieradet_sam2 import HieraDet
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, Pooling
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.pit import PoolingVisionTransformer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.twins import Twins
from timm.models.volo import VOLO
from torch import Tensor, nn

from pdvit.models.families import FAMILIES
from pdvit.models.layers import measure_layers, places_of
from pdvit.models.tokens import DiverseModel

View = Callable[[nn.Module, Any], Tensor]
CLASSES = 3


def nlc(prefix: int = 0) -> View:
    return lambda model, output: output[:, prefix:]


def nhwc(model: nn.Module, output: Tensor) -> Tensor:
    batch, height, width, channels = output.shape
    return output.reshape(batch, height * width, channels)


def nchw(model: nn.Module, output: Tensor) -> Tensor:
    return nhwc(model, output.permute(0, 2, 3, 1))


def with_size(view: View) -> View:
    return lambda model, output: view(model, output[0])


class Case(NamedTuple):
    """How to build a small model, and which modules put out first and last, in which layout."""

    build: Callable[[], nn.Module]
    first: str
    view: View
    last: str
    last_view: View
    grid: tuple[int, int]
    image: int


def vit(name: str, prefix: int, last: str = "norm", last_prefix: int | None = None, **arguments: Any) -> Case:
    sizes = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": CLASSES}
    last_view = nlc(prefix if last_prefix is None else last_prefix)
    sizes |= arguments
    side = sizes["img_size"] // sizes.pop("stride", sizes["patch_size"])

    def build() -> nn.Module:
        return timm.create_model(name, **sizes)

    return Case(build, "blocks.0", nlc(prefix), last, last_view, (side, side), sizes["img_size"])


def pyramid(
    build: Callable[..., nn.Module], first: str, view: View, last: str, last_view: View | None = None, **arguments: Any
) -> Case:
    image = arguments.pop("image", 64)
    side = arguments.pop("side", image // 32)

    def sized() -> nn.Module:
        model = build(num_classes=CLASSES, **arguments)
        model.pretrained_cfg = {"input_size": (3, image, image)}  # what timm's factory does
        return model

    return Case(sized, first, view, last, last_view or view, (side, side), image)


def named(name: str) -> Callable[..., nn.Module]:
    return lambda **arguments: timm.create_model(name, **arguments)


def in_order(model: nn.Module, output: Tensor) -> Tensor:
    """Sort the tokens of Hiera's last stage by where their pixels come from: as `unroll` moves a map of positions."""
    positions = torch.arange(16 * 16).view(1, -1, 1)  # of the tokens that enter the first block
    pooled = model.unroll(positions).view(-1, output.shape[1])  # one column for each token of the last stage
    return output[:, pooled.amin(0).argsort()]


def maxxvit(block: str) -> MaxxVitCfg:
    small = {"embed_dim": (8, 8, 16, 16), "depths": (1, 1, 1, 2), "stem_width": 8}
    if block == "maxvit":
        attention = MaxxVitTransformerCfg(dim_head=8, window_size=2, grid_size=2)
        return MaxxVitCfg(**small, block_type=("M",) * 4, transformer_cfg=attention)
    attention = MaxxVitTransformerCfg(dim_head=8, rel_pos_type="bias")
    return MaxxVitCfg(**small, block_type=("C", "C", "T", "T"), conv_cfg=MaxxVitConvCfg(), transformer_cfg=attention)


FOUR = {"depths": (1, 1, 1, 2), "num_heads": (1, 2, 2, 4)}
WIDTHS = {"embed_dims": (8, 16, 16, 32)}
HIERA = {"stages": (1, 1, 1, 2), "embed_dim": 8, "img_size": (64, 64)}
MVIT = {"embed_dim": 8, "depths": (1, 1, 1, 2)}
CASES = {
    "vit": vit("vit_tiny_patch16_224", 1),
    "vit-mean": vit("vit_tiny_patch16_224", 1, "blocks.1", global_pool="avg"),
    "vit-without-class-token": vit("vit_tiny_patch16_224", 0, "blocks.1", global_pool="avg", class_token=False),
    "deit": vit("deit_tiny_patch16_224", 1),
    "deit-distilled": vit("deit_tiny_distilled_patch16_224", 2),
    "deit3": vit("deit3_small_patch16_224", 1),
    "dinov2-registers": vit("vit_small_patch14_reg4_dinov2", 5),
    "dinov3": vit("vit_small_patch16_dinov3", 5),
    "siglip": vit("vit_base_patch16_siglip_224", 0),
    "clip": vit("vit_base_patch16_clip_224", 1),
    "flexivit": vit("flexivit_small", 1),
    "relpos": vit("vit_relpos_small_patch16_224", 0, "blocks.1"),
    "hybrid": vit("vit_tiny_r_s16_p8_224", 1, patch_size=2, stride=8),
    "eva02": vit("eva02_tiny_patch14_224", 1, "blocks.1"),
    "rope": vit("vit_small_patch16_rope_224", 1),
    "beit": vit("beit_base_patch16_224", 1, "blocks.1"),
    "cait": vit("cait_xxs24_224", 0, last_prefix=1),
    "xcit": vit("xcit_nano_12_p16_224", 0, last_prefix=1),
    "mixer": pyramid(
        MlpMixer, *("blocks.0", nlc(), "norm"), img_size=32, patch_size=8, num_blocks=2, embed_dim=24, image=32, side=4
    ),
    "naflexvit": pyramid(
        NaFlexVit,
        *("blocks.0", nlc(2), "norm"),
        cfg=NaFlexVitCfg(patch_size=16, embed_dim=24, depth=2, num_heads=2, reg_tokens=2, class_token=False),
        side=4,
    ),
    "swin": pyramid(
        named("swin_tiny_patch4_window7_224"),
        *("layers.3.blocks.0", nhwc, "norm"),
        **FOUR | {"img_size": 64, "window_size": 2, "embed_dim": 8},
    ),
    "swinv2": pyramid(
        named("swinv2_tiny_window8_256"),
        *("layers.3.blocks.0", nhwc, "norm"),
        **FOUR | {"img_size": 64, "window_size": 2, "embed_dim": 8},
    ),
    "swinv2-cr": pyramid(
        named("swinv2_cr_tiny_224"),
        *("stages.3.blocks.0", nhwc, "stages.3.blocks.1"),
        **FOUR | {"img_size": 64, "window_size": 2, "embed_dim": 8},
    ),
    "pvtv2": pyramid(
        PyramidVisionTransformerV2,
        *("stages.3.blocks.0", nlc(), "stages.3.norm"),
        **FOUR | WIDTHS | {"mlp_ratios": (2, 2, 2, 2), "image": 64},
    ),
    "mvitv2": pyramid(
        MultiScaleVit,
        *("stages.3.blocks.0", with_size(nlc()), "norm", nlc()),
        cfg=MultiScaleVitCfg(**MVIT),
        img_size=(128, 128),
        image=128,
    ),
    "mvitv2-class-token": pyramid(
        MultiScaleVit,
        *("stages.3.blocks.0", with_size(nlc(1)), "norm", nlc(1)),
        cfg=MultiScaleVitCfg(**MVIT, use_cls_token=True),
        img_size=(128, 128),
        image=128,
    ),
    "twins-svt": pyramid(
        Twins, *("blocks.3.0", nlc(), "norm"), **FOUR | WIDTHS | {"img_size": 64, "wss": (2, 2, 2, 2)}
    ),
    "twins-pcpvt": pyramid(Twins, *("blocks.3.0", nlc(), "norm"), **FOUR | WIDTHS | {"img_size": 64}),
    "volo": pyramid(
        VOLO,
        *("network.2.0", nhwc, "norm", nlc(1)),
        layers=(1, 1, 1, 1),
        embed_dims=(8, 16, 16, 16),
        num_heads=(2, 2, 2, 2),
        stem_hidden_dim=8,
        img_size=64,
        side=4,
    ),
    "hiera": pyramid(named("hiera_tiny_224"), *("blocks.3", in_order, "blocks.4"), **HIERA),
    "hiera-two-pools": pyramid(named("hiera_tiny_224"), *("blocks.3", in_order, "blocks.4"), **HIERA, q_pool=2, side=4),
    "hieradet": pyramid(
        HieraDet,
        *("blocks.3", nhwc, "blocks.4"),
        embed_dim=8,
        stages=(1, 1, 1, 2),
        window_spec=(4, 4, 2, 2),
        global_att_blocks=(),
        image=64,
    ),
    "maxvit": pyramid(MaxxVit, *("stages.3.blocks.0", nchw, "norm"), cfg=maxxvit("maxvit"), img_size=64),
    "coatnet": pyramid(MaxxVit, *("stages.3.blocks.0", nchw, "norm"), cfg=maxxvit("coatnet"), img_size=64),
    "convnext": pyramid(
        named("convnext_tiny"),
        *("stages.3.blocks.0", nchw, "stages.3.blocks.1"),
        depths=(1, 1, 1, 2),
        dims=(8, 8, 16, 16),
        image=64,
    ),
    "davit": pyramid(
        DaVit,
        *("stages.3.blocks.0.0", nchw, "stages.3.blocks.1.1"),
        **FOUR | WIDTHS | {"image": 64},
    ),
    "focalnet": pyramid(
        FocalNet,
        *("layers.3.blocks.0", nchw, "norm"),
        depths=(1, 1, 1, 2),
        embed_dim=8,
        image=64,
    ),
    "gcvit": pyramid(
        GlobalContextVit,
        *("stages.3.blocks.0", nhwc, "stages.3.norm"),
        **FOUR | {"embed_dim": 8, "img_size": 64, "depths": (2, 2, 2, 2)},
    ),
    "pit": pyramid(
        PoolingVisionTransformer,
        *("transformers.2.blocks.0", nlc(1), "transformers.2.blocks.1"),
        img_size=64,
        base_dims=(8, 8, 8),
        depth=(1, 1, 2),
        heads=(1, 2, 4),
        side=2,
    ),
    "poolformer": pyramid(
        MetaFormer,
        *("stages.3.blocks.0", nchw, "stages.3.blocks.1"),
        depths=(1, 1, 1, 2),
        dims=(8, 16, 24, 32),
        token_mixers=Pooling,
        use_mlp_head=False,
        image=64,
    ),
    "caformer": pyramid(
        MetaFormer,
        *("stages.3.blocks.0", nlc(), "stages.3.blocks.1"),
        depths=(1, 1, 1, 2),
        dims=(8, 16, 32, 64),
        token_mixers=[Pooling, Pooling, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        image=64,
    ),
}

# One of each way to read: by return value with prefix tokens, behind a norm of another place, by hooks in each layout.
QUICK = {"vit", "deit-distilled", "eva02", "cait", "swin", "pvtv2", "hiera", "convnext"}
NAMES = [pytest.param(name, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
all_families = pytest.mark.parametrize("case", [pytest.param(CASES[p.id], id=p.id, marks=p.marks) for p in NAMES])


def make(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.build()
    # Fresh layer scales are nearly zero, so that a wrong layer could look right.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and not name.endswith("bias"):
                weight.uniform_(0.5, 1.5)
            elif not weight.any():
                weight.normal_(std=0.02)
    return model.eval()


def pictures(case: Case, count: int = 2) -> Tensor:
    return torch.randn(count, 3, case.image, case.image, generator=torch.Generator().manual_seed(1))


def spy(model: nn.Module, path: str, view: View, images: Tensor) -> Tensor:
    """Return what a module puts out during the bare model's own forward pass, as this file sees it."""
    seen: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    (output,) = seen
    return view(model, output)


def test_every_row_of_the_table_is_tested():
    assert len(CASES) >= 25
    tested = {cls.__name__ for case in CASES.values() for cls in type(case.build()).__mro__}
    assert set(FAMILIES) <= tested


@all_families
def test_logits_are_those_of_the_bare_model(case):
    model, images = make(case), pictures(case)
    with torch.no_grad():
        expected = model(images)
        wrapper = DiverseModel(model)
        assert torch.equal(wrapper.eval()(images).logits, expected)
        torch.manual_seed(3)
        ours = wrapper.train()(images).logits
        torch.manual_seed(3)
        torch.testing.assert_close(ours, model.train()(images), rtol=0, atol=0)


@all_families
def test_first_and_last_are_what_their_modules_put_out(case):
    model, images = make(case), pictures(case)
    with torch.no_grad():
        output = DiverseModel(model).eval()(images)
    first, last = spy(model, case.first, case.view, images), spy(model, case.last, case.last_view, images)
    assert output.first.shape == output.last.shape == first.shape
    assert output.first.shape[1] == case.grid[0] * case.grid[1]
    assert torch.equal(output.first, first)
    assert torch.equal(output.last, last)
    assert not torch.equal(first, last)
    assert output.patch_logits.shape == (*first.shape[:2], CLASSES)


def reached(module: nn.Module) -> set[str]:
    return {name for name, weight in module.named_parameters() if weight.grad is not None and weight.grad.any()}


@all_families
def test_gradients_reach_every_weight_that_the_bare_model_reaches(case):
    model, images = make(case).train(), pictures(case, 4)
    model(images).exp().sum().backward()
    bare = reached(model)
    assert bare
    model.zero_grad(set_to_none=True)
    wrapper = DiverseModel(model).train()
    output = wrapper(images)
    (output.logits.exp().sum() + output.patch_logits.exp().sum() + output.first.exp().sum()).backward()
    assert bare <= reached(model)
    assert reached(wrapper.patch_head) == {"weight", "bias"}
    trainable = {name for name, _ in model.named_parameters()}
    assert {name for name in trainable - reached(model) if "aux_head" not in name} == set()


@all_families
def test_the_terms_alone_reach_the_first_layer(case):
    model = make(case)
    DiverseModel(model, patch_head=False)(pictures(case)).last.exp().sum().backward()
    block = model.get_submodule(case.first)
    assert any(weight.grad is not None and weight.grad.any() for weight in block.parameters())


# Their convolutions reach over the borders of a patch, so that a neighbour can change more.
OVERLAPPING = {"xcit", "mvitv2", "mvitv2-class-token", "hiera-two-pools"}


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_of_the_image_changes_its_own_token_most(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()  # as timm makes it: what passes by the blocks is still larger than what they mix
    rows, columns = case.grid
    side = case.image // rows
    image = pictures(case, 1)
    changed = image.repeat(rows * columns, 1, 1, 1)
    for row in range(rows):
        for column in range(columns):
            area = changed[
                row * columns + column, :, row * side : (row + 1) * side, column * side : (column + 1) * side
            ]
            area.copy_(torch.randn(area.shape, generator=torch.Generator().manual_seed(7)) * 3)
    wrapper = DiverseModel(model).eval()
    with torch.no_grad():
        before, after = wrapper(image).first, wrapper(changed).first
    most = (after - before).norm(dim=-1).argmax(1)
    own = torch.arange(rows * columns)
    off = torch.maximum((most // columns - own // columns).abs(), (most % columns - own % columns).abs())
    assert not off.any() or (name in OVERLAPPING and rows >= 4 and off.max() <= 1)


@all_families
def test_layers_are_named_from_the_embedding_to_the_norm(case):
    model, images = make(case), pictures(case)
    layers = list(places_of(model))
    found = measure_layers(model, images, torch.clone)
    assert list(found) == layers
    assert [layer.depth for layer in layers] == list(range(len(layers)))
    names = [layer.name for layer in layers]
    normed = names[-1] == "norm"
    assert names[: len(names) - normed] == ["embed", *(f"block {i}" for i in range(1, len(names) - normed))]
    with torch.no_grad():
        output = DiverseModel(model).eval()(images)
    assert torch.equal(found[layers[-1]], output.last)
    assert any(torch.equal(tokens, output.first) for tokens in found.values())
    assert all(tokens.ndim == 3 for tokens in found.values())


@all_families
def test_a_deep_copy_reads_its_own_tokens(case):
    wrapper, images = DiverseModel(make(case)).train(), pictures(case, 4)
    output = wrapper(images)
    output.last.exp().sum().backward()
    twin = copy.deepcopy(wrapper).eval()
    wrapper.eval()
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1.5)
        theirs, ours = twin(images), wrapper(images)
        expected = DiverseModel(twin.model).eval()(images)
    assert torch.equal(theirs.first, expected.first)
    assert torch.equal(theirs.last, expected.last)
    assert not torch.equal(theirs.last, ours.last)
