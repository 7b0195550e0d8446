"""Every family of the table, as a small instance, against views of its blocks that are written here by hand."""

from collections.abc import Callable
from functools import partial
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
from pdvit.models.layers import find_layers
from pdvit.models.tokens import DiverseModel
from tests.unit.models.support import SMALL, SMALL_SWIN, tokens_of

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


def in_order(model: nn.Module, output: Tensor) -> Tensor:
    """Sort the tokens of Hiera's last stage by where their pixels come from: as `unroll` moves a map of positions."""
    positions = torch.arange(16 * 16).view(1, -1, 1)  # of the tokens that enter the first block
    pooled = model.unroll(positions).view(-1, output.shape[1])  # one column for each token of the last stage
    return output[:, pooled.amin(0).argsort()]


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
    sizes = SMALL | arguments
    side = sizes["img_size"] // sizes.pop("stride", sizes["patch_size"])
    last_view = nlc(prefix if last_prefix is None else last_prefix)
    build = partial(timm.create_model, name, **sizes)
    return Case(build, "blocks.0", nlc(prefix), last, last_view, (side, side), sizes["img_size"])


def pyramid(
    build: str | Callable[..., nn.Module],
    first: str,
    view: View,
    last: str,
    last_view: View | None = None,
    image: int = 64,
    side: int | None = None,
    **arguments: Any,
) -> Case:
    def sized() -> nn.Module:
        make = partial(timm.create_model, build) if isinstance(build, str) else build
        model = make(num_classes=CLASSES, **arguments)
        model.pretrained_cfg = {"input_size": (3, image, image)}  # what timm's factory does
        return model

    side = side or image // 32
    return Case(sized, first, view, last, last_view or view, (side, side), image)


def maxxvit(*blocks: str, **attention: Any) -> MaxxVitCfg:
    small = {"embed_dim": (8, 8, 16, 16), "depths": (1, 1, 1, 2), "stem_width": 8}
    config = MaxxVitTransformerCfg(dim_head=8, **attention)
    return MaxxVitCfg(**small, block_type=blocks, conv_cfg=MaxxVitConvCfg(), transformer_cfg=config)


DEPTHS = {"depths": (1, 1, 1, 2)}
FOUR = DEPTHS | {"num_heads": (1, 2, 2, 4)}
WIDTHS = {"embed_dims": (8, 16, 16, 32)}
HIERA = {"stages": (1, 1, 1, 2), "embed_dim": 8}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24}
NAFLEX = NaFlexVitCfg(patch_size=16, embed_dim=24, depth=2, num_heads=2, reg_tokens=2, class_token=False)
VOLO_SIZES = {"layers": (1,) * 4, "embed_dims": (8, 16, 16, 16), "num_heads": (2,) * 4, "stem_hidden_dim": 8}
MIXERS = [Pooling, Pooling, Attention, Attention]
NORMS = [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2


def mvit(prefix: int, **more: Any) -> Case:
    views = {"view": with_size(nlc(prefix)), "last": "norm", "last_view": nlc(prefix)}
    config = MultiScaleVitCfg(embed_dim=8, **DEPTHS, **more)
    return pyramid(MultiScaleVit, "stages.3.blocks.0", **views, image=128, cfg=config, img_size=(128, 128))


CASES = {
    "vit": vit("vit_tiny_patch16_224", 1, drop_path_rate=0.2, proj_drop_rate=0.1),
    "vit-mean": vit("vit_tiny_patch16_224", 1, "blocks.1", global_pool="avg"),
    "vit-mean-after-the-norm": vit("vit_tiny_patch16_224", 1, global_pool="avg", fc_norm=False),
    "vit-without-class-token": vit("vit_tiny_patch16_224", 0, "blocks.1", global_pool="avg", class_token=False),
    "deit-distilled": vit("deit_tiny_distilled_patch16_224", 2),
    "deit3": vit("deit3_small_patch16_224", 1),
    "dinov2-registers": vit("vit_small_patch14_reg4_dinov2", 5),
    "dinov3": vit("vit_small_patch16_dinov3", 5),
    "siglip": vit("vit_base_patch16_siglip_224", 0),
    "relpos": vit("vit_relpos_small_patch16_224", 0, "blocks.1"),
    "hybrid": vit("vit_tiny_r_s16_p8_224", 1, patch_size=2, stride=8),
    "eva02": vit("eva02_tiny_patch14_224", 1, "blocks.1"),
    "rope": vit("vit_small_patch16_rope_224", 1),
    "beit": vit("beit_base_patch16_224", 1, "blocks.1"),
    "cait": vit("cait_xxs24_224", 0, last_prefix=1),
    "xcit": vit("xcit_nano_12_p16_224", 0, last_prefix=1),
    "mixer": pyramid(MlpMixer, "blocks.0", nlc(), "norm", image=32, side=4, **MIXER),
    "naflexvit": pyramid(NaFlexVit, "blocks.0", nlc(2), "norm", side=4, cfg=NAFLEX),
    "swin": pyramid("swin_tiny_patch4_window7_224", "layers.3.blocks.0", nhwc, "norm", **SMALL_SWIN),
    "swinv2": pyramid("swinv2_tiny_window8_256", "layers.3.blocks.0", nhwc, "norm", **SMALL_SWIN),
    "swinv2-cr": pyramid("swinv2_cr_tiny_224", "stages.3.blocks.0", nhwc, "stages.3.blocks.1", **SMALL_SWIN),
    "pvtv2": pyramid(
        PyramidVisionTransformerV2, "stages.3.blocks.0", nlc(), "stages.3.norm", mlp_ratios=(2,) * 4, **FOUR | WIDTHS
    ),
    "mvitv2": mvit(0),
    "mvitv2-class-token": mvit(1, use_cls_token=True),
    "twins-svt": pyramid(Twins, "blocks.3.0", nlc(), "norm", img_size=64, wss=(2,) * 4, **FOUR | WIDTHS),
    "twins-pcpvt": pyramid(Twins, "blocks.3.0", nlc(), "norm", img_size=64, **FOUR | WIDTHS),
    "volo": pyramid(VOLO, "network.2.0", nhwc, "norm", nlc(1), side=4, img_size=64, **VOLO_SIZES),
    "hiera": pyramid("hiera_tiny_224", "blocks.3", in_order, "blocks.4", img_size=(64, 64), **HIERA),
    "hiera-two-pools": pyramid(
        "hiera_tiny_224", "blocks.3", in_order, "blocks.4", img_size=(64, 64), q_pool=2, side=4, **HIERA
    ),
    "hieradet": pyramid(
        HieraDet, "blocks.3", nhwc, "blocks.4", window_spec=(4, 4, 2, 2), global_att_blocks=(), **HIERA
    ),
    "maxvit": pyramid(
        MaxxVit, "stages.3.blocks.0", nchw, "norm", cfg=maxxvit(*"MMMM", window_size=2, grid_size=2), img_size=64
    ),
    "coatnet": pyramid(
        MaxxVit, "stages.3.blocks.0", nchw, "norm", cfg=maxxvit(*"CCTT", rel_pos_type="bias"), img_size=64
    ),
    "convnext": pyramid("convnext_tiny", "stages.3.blocks.0", nchw, "stages.3.blocks.1", dims=(8, 8, 16, 16), **DEPTHS),
    "davit": pyramid(DaVit, "stages.3.blocks.0.0", nchw, "stages.3.blocks.1.1", **FOUR | WIDTHS),
    "focalnet": pyramid(FocalNet, "layers.3.blocks.0", nchw, "norm", embed_dim=8, **DEPTHS),
    "gcvit": pyramid(
        *(GlobalContextVit, "stages.3.blocks.0", nhwc, "stages.3.norm"),
        **FOUR | {"embed_dim": 8, "img_size": 64, "depths": (2, 2, 2, 2)},
    ),
    "pit": pyramid(
        *(PoolingVisionTransformer, "transformers.2.blocks.0", nlc(1), "transformers.2.blocks.1"),
        **{"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 2), "heads": (1, 2, 4), "side": 2},
    ),
    "poolformer": pyramid(
        *(MetaFormer, "stages.3.blocks.0", nchw, "stages.3.blocks.1"),
        **DEPTHS | {"dims": (8, 16, 24, 32), "token_mixers": Pooling, "use_mlp_head": False},
    ),
    "caformer": pyramid(
        *(MetaFormer, "stages.3.blocks.0", nlc(), "stages.3.blocks.1"),
        **DEPTHS | {"dims": (8, 16, 32, 64), "token_mixers": MIXERS, "norm_layers": NORMS},
    ),
}

# One of each way to read: by return value with prefix tokens, after a norm of another place, by hooks in each layout.
QUICK = {"vit", "deit-distilled", "eva02", "cait", "swin", "pvtv2", "hiera", "convnext"}
all_families = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)


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
    """Return the output of a module in the bare model's own forward pass, as this file views it."""
    seen: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    (output,) = seen
    return view(model, output)


def test_every_row_of_the_table_is_tested():
    tested = {cls.__name__ for case in CASES.values() for cls in type(case.build()).__mro__}
    assert set(FAMILIES) <= tested


@all_families
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_bare_model(name):
    case = CASES[name]
    model, images = make(case), pictures(case)
    wrapper = DiverseModel(model).eval()
    output = wrapper(images)
    assert torch.equal(output.logits, model(images))
    first, last = spy(model, case.first, case.view, images), spy(model, case.last, case.last_view, images)
    assert output.first.shape == output.last.shape == first.shape
    assert output.first.shape[1] == case.grid[0] * case.grid[1]
    assert torch.equal(output.first, first)
    assert torch.equal(output.last, last)
    assert not torch.equal(first, last)
    head = wrapper.patch_head
    torch.testing.assert_close(output.patch_logits, torch.einsum("bnd,cd->bnc", last, head.weight) + head.bias)

    layers = tokens_of(model, images)
    names = list(layers)
    blocks = len(names) - (names[-1] == "norm")
    assert names == list(find_layers(model)[1])
    assert names[:blocks] == ["embed", *(f"block {i}" for i in range(1, blocks))]
    assert torch.equal(list(layers.values())[-1], last)
    assert any(torch.equal(tokens, first) for tokens in layers.values())

    torch.manual_seed(3)
    ours = wrapper.train()(images).logits
    torch.manual_seed(3)
    assert torch.equal(ours, model.train()(images))


# Their convolutions reach over the borders of a patch, so that a neighbour can change more.
OVERLAPPING = {"xcit", "mvitv2", "mvitv2-class-token", "hiera-two-pools"}


@all_families
def test_a_patch_of_the_image_changes_its_own_token_most(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()  # as timm makes it: the residual stream is still larger than what blocks mix
    rows, columns = case.grid
    side = case.image // rows
    image = pictures(case, 1)
    changed = image.repeat(rows * columns, 1, 1, 1)
    for patch in range(rows * columns):
        top, left = (side * at for at in divmod(patch, columns))
        area = changed[patch, :, top : top + side, left : left + side]
        area.copy_(torch.randn(area.shape, generator=torch.Generator().manual_seed(7)) * 3)
    wrapper = DiverseModel(model).eval()
    with torch.no_grad():
        before, after = wrapper(image).first, wrapper(changed).first
    most = (after - before).norm(dim=-1).argmax(1)
    own = torch.arange(rows * columns)
    off = torch.maximum((most // columns - own // columns).abs(), (most % columns - own % columns).abs())
    assert not off.any() or (name in OVERLAPPING and rows >= 4 and off.max() <= 1)
