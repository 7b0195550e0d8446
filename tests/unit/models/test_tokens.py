import copy
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.layers import measure_layers
from pdvit.models.tokens import DiverseModel

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
PATCHES, WIDTH = 16, 24


class Case(NamedTuple):
    """A model, how many prefix tokens it has, and which module puts out the last tokens."""

    name: str
    prefix: int
    last: str
    arguments: dict


CASES = [
    Case("vit_tiny_patch16_224", 1, "norm", {}),
    Case("vit_tiny_patch16_224", 1, "blocks.1", {"global_pool": "avg"}),
    Case("vit_tiny_patch16_224", 0, "blocks.1", {"global_pool": "avg", "class_token": False}),
    Case("vit_tiny_patch16_224", 1, "norm", {"global_pool": "avg", "fc_norm": False}),
    Case("deit_tiny_distilled_patch16_224", 2, "norm", {}),
    Case("vit_small_patch14_reg4_dinov2", 5, "norm", {}),
    Case("vit_base_patch16_siglip_224", 0, "norm", {}),
    Case("deit3_small_patch16_224", 1, "norm", {}),
    Case("vit_relpos_small_patch16_224", 0, "blocks.1", {}),
    Case("eva02_tiny_patch14_224", 1, "blocks.1", {}),
    Case("vit_small_patch16_dinov3", 5, "norm", {}),
    Case("beit_base_patch16_224", 1, "blocks.1", {}),
    Case("vit_base_patch16_clip_224", 1, "norm", {}),
]
all_models = pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{case.last}-{case.prefix}" for case in CASES])


def make(case, **more):
    model = timm.create_model(case.name, **SMALL | case.arguments | more)
    # Fresh layer scales are nearly zero, so that a wrong layer could look right.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval()


def pictures(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def spy(model, path, images):
    """Return what a module puts out during the bare model's own forward pass."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    (output,) = seen
    return output


@all_models
def test_logits_are_those_of_the_bare_model(case):
    model, images = make(case), pictures()
    with torch.no_grad():
        assert torch.equal(DiverseModel(model).eval()(images).logits, model(images))


@all_models
def test_training_logits_are_those_of_the_bare_model_under_one_seed(case):
    model, images = make(case, drop_path_rate=0.5).train(), pictures(4)
    wrapper = DiverseModel(model).train()
    with torch.no_grad():
        torch.manual_seed(3)
        ours = wrapper(images).logits
        torch.manual_seed(3)
        theirs = model(images)
        torch.manual_seed(4)
        other = model(images)
    assert torch.equal(ours, theirs)
    assert not torch.equal(theirs, other)


@all_models
def test_first_and_last_are_what_the_blocks_and_the_norm_put_out(case):
    model, images = make(case), pictures()
    with torch.no_grad():
        output = DiverseModel(model).eval()(images)
    assert output.first.shape == output.last.shape == (2, PATCHES, WIDTH)
    assert torch.equal(output.first, spy(model, "blocks.0", images)[:, case.prefix :])
    assert torch.equal(output.last, spy(model, case.last, images)[:, case.prefix :])
    assert not torch.equal(output.first, output.last)


@all_models
def test_patch_logits_are_a_linear_map_of_last(case):
    wrapper = DiverseModel(make(case)).eval()
    nn.init.normal_(wrapper.patch_head.bias)
    with torch.no_grad():
        output = wrapper(pictures())
    expected = torch.einsum("bnd,cd->bnc", output.last, wrapper.patch_head.weight) + wrapper.patch_head.bias
    torch.testing.assert_close(output.patch_logits, expected)


def reached(module):
    return {name for name, weight in module.named_parameters() if weight.grad is not None and weight.grad.any()}


@all_models
def test_gradients_reach_every_weight_that_the_bare_model_reaches(case):
    model, images = make(case), pictures()
    model(images).square().sum().backward()
    bare = reached(model)
    assert bare
    model.zero_grad(set_to_none=True)
    wrapper = DiverseModel(model)
    output = wrapper(images)
    (output.logits.square().sum() + output.patch_logits.exp().sum() + output.first.exp().sum()).backward()
    assert bare <= reached(wrapper.model)
    assert reached(wrapper.patch_head) == {"weight", "bias"}


@all_models
def test_the_terms_alone_reach_the_first_block(case):
    wrapper = DiverseModel(make(case), patch_head=False)
    wrapper(pictures()).last.exp().sum().backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in wrapper.model.blocks[0].parameters())


def test_without_a_patch_head_there_are_no_patch_logits():
    wrapper = DiverseModel(make(CASES[0]), patch_head=False)
    assert wrapper(pictures()).patch_logits is None
    assert all(name.startswith("model.") for name in wrapper.state_dict())


def test_a_patch_head_without_classes_is_refused():
    model = make(CASES[0], num_classes=0)
    with pytest.raises(UserError, match="no classes"):
        DiverseModel(model)
    assert DiverseModel(model, patch_head=False)(pictures()).last.shape == (2, PATCHES, WIDTH)


def small(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
    return timm.create_model(name, **sizes | arguments).eval()


def convnext() -> nn.Module:
    return timm.create_model("convnext_tiny", depths=(1, 1, 1, 2), dims=(8, 8, 16, 16), num_classes=3)


def swin(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 1, 2), "num_heads": (1, 2, 2, 4), "img_size": 64, "window_size": 2, "embed_dim": 8}
    named = {"num_classes": 3, "drop_path_rate": 0.0}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes | named | arguments).eval()


@pytest.mark.parametrize(
    ("name", "entering"), [("embed", True), ("patches", False)], ids=["what-enters-the-blocks", "patch-embedding"]
)
@pytest.mark.parametrize(
    ("model", "prefix"),
    [("vit_tiny_patch16_224", 1), ("deit3_small_patch16_224", 1), ("eva02_tiny_patch14_224", 1), ("cait_xxs24_224", 0)],
)
def test_first_can_be_before_the_blocks(name, entering, model, prefix):
    model, images = small(model), torch.randn(2, 3, 32, 32)
    plain, wrapper = DiverseModel(model).eval()(images), DiverseModel(model, first=name).eval()
    seen = []
    if entering:
        model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, prefix:]))
    else:
        model.patch_embed.register_forward_hook(lambda _, __, output: seen.append(output.reshape(2, 16, 24)))
    seen.clear()
    with torch.no_grad():
        output = wrapper(images)
        assert torch.equal(output.first, seen[0])
        assert torch.equal(output.logits, model(images))
    torch.testing.assert_close(output.last, plain.last)
    assert not torch.equal(output.first, plain.first)


@pytest.mark.parametrize("first", [2, "2"])
def test_first_can_be_any_block(first):
    model, images = small(), torch.randn(2, 3, 32, 32)
    found = {layer.name: tokens for layer, tokens in measure_layers(model, images, torch.clone).items()}
    output = DiverseModel(model, first=first)(images)
    torch.testing.assert_close(output.first, found["block 2"])


@pytest.mark.parametrize("build", [small, swin])
def test_last_can_be_before_the_norm_and_the_patch_head_stays_behind_it(build):
    model = build()
    images = torch.randn(2, 3, 32 if build is small else 64, 32 if build is small else 64)
    found = {layer.name: tokens for layer, tokens in measure_layers(model, images, torch.clone).items()}
    blocks = [name for name in found if name.startswith("block")]
    wrapper = DiverseModel(model, last="block").eval()
    output = wrapper(images)
    torch.testing.assert_close(output.last, found[blocks[-1]])
    torch.testing.assert_close(output.patch_logits, wrapper.patch_head(found["norm"]))


@pytest.mark.parametrize("build", [small, swin])
def test_the_cosine_term_can_see_more_layers(build):
    model = build()
    images = torch.randn(2, 3, 32 if build is small else 64, 32 if build is small else 64)
    found = {layer.name: tokens for layer, tokens in measure_layers(model, images, torch.clone).items()}
    output = DiverseModel(model, cosine_layers=(3, 1))(images)
    assert len(output.others) == 2
    torch.testing.assert_close(output.others[0], found["block 3"])
    torch.testing.assert_close(output.others[1], found["block 1"])
    assert DiverseModel(model)(images).others == ()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"first": "norm"}, "no first called .norm."),
        ({"first": 0}, "no block 0"),
        ({"first": 4}, "no block 4"),
        ({"first": 3, "last": "block"}, "both block 3"),
        ({"last": "head"}, "no last called 'head'"),
        ({"cosine_layers": (1, 9)}, "no block 9"),
        ({"patch_head": "linear"}, "no patch head called"),
        ({"patch_head": nn.Linear(25, 3)}, "width 24"),
        ({"patch_head": nn.Linear(24, 3 + 1)}, "not 3 classes"),
        ({"patch_head": nn.Flatten()}, "not 3 classes"),
    ],
)
def test_layers_and_heads_that_do_not_fit_are_refused(options, what):
    with pytest.raises(UserError, match=what) as caught:
        DiverseModel(small(), **options)
    assert caught.value.tip


@pytest.mark.parametrize("first", ["embed", "patches", 1, 2, 3])
def test_what_has_another_grid_than_last_can_not_be_first(first):
    with pytest.raises(UserError, match="the shape of"):
        DiverseModel(swin(), first=first)


def test_a_last_stage_of_one_block_has_first_and_last_apart_only_behind_a_norm():
    one = {"depths": (1, 1, 1, 1)}
    images = torch.randn(1, 3, 64, 64)
    output = DiverseModel(swin(**one))(images)
    assert not torch.equal(output.first, output.last)
    with pytest.raises(UserError, match="none can be first"):
        DiverseModel(swin(**one), last="block")


def test_a_given_patch_head_is_used_as_it_is():
    head = nn.Sequential(nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 3))
    output = DiverseModel(small(), patch_head=head)(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(output.patch_logits, head(output.last))


@pytest.mark.parametrize("build", [small, swin])
def test_the_models_own_classifier_can_be_the_patch_head(build):
    model = build()
    side = 32 if build is small else 64
    wrapper = DiverseModel(model, patch_head="class").eval()
    output = wrapper(torch.randn(2, 3, side, side))
    classifier = model.head if build is small else model.head.fc
    torch.testing.assert_close(output.patch_logits, classifier(output.last))
    assert all(name.startswith("model.") for name in wrapper.state_dict())
    output.patch_logits.sum().backward()
    assert classifier.weight.grad.any()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: small(num_classes=0), "not one linear layer"),
        (lambda: small("deit_tiny_distilled_patch16_224"), "not one linear layer"),
        (lambda: small(global_pool="avg"), "fc_norm"),
        (convnext, "head.norm"),
    ],
)
def test_a_classifier_that_does_not_read_the_tokens_is_refused_as_patch_head(model, why):
    with pytest.raises(UserError, match=why):
        DiverseModel(model(), patch_head="class")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resnet18", "no tokens"),
        ("efficientnet_b0", "no tokens"),
        ("mobilevit_xxs", "between convolutions"),
        ("efficientformer_l1", "between convolutions"),
        ("qwen3_vit_88m_enc", "language model"),
        ("convit_tiny", "half-way"),
        ("crossvit_9_240", "side by side"),
        ("tnt_s_patch16_224", "pixels"),
        ("nest_tiny", "windows"),
    ],
)
def test_models_that_are_not_in_the_table_are_refused_with_a_reason(name, why):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=why):
        DiverseModel(model)


@pytest.mark.parametrize(
    ("wrap", "attribute"),
    [(DiverseModel, "model"), (nn.DataParallel, "module"), (lambda model: torch.compile(model), "_orig_mod")],
)
def test_a_wrapper_is_refused_by_naming_the_model_inside(wrap, attribute):
    with pytest.raises(UserError) as caught:
        DiverseModel(wrap(swin()))
    assert caught.value.tip == f"pass the bare model, which is its .{attribute}"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_dropping_patches_is_refused(name):
    with pytest.raises(UserError, match="patch_drop_rate"):
        DiverseModel(small(name, patch_drop_rate=0.5))


def test_dropping_patches_is_refused_in_hierarchical_models_too():
    with pytest.raises(UserError, match="patch_drop_rate"):
        DiverseModel(
            timm.create_model(
                "hiera_tiny_224", stages=(1, 1, 1, 2), embed_dim=8, img_size=(64, 64), patch_drop_rate=0.5
            )
        )
    cfg = NaFlexVitCfg(patch_size=16, embed_dim=24, depth=2, num_heads=2, patch_drop_rate=0.5)
    with pytest.raises(UserError, match="patch_drop_rate"):
        DiverseModel(NaFlexVit(cfg))


def test_a_neck_or_norm_of_another_width_is_not_compared():
    model = small()
    model.norm = nn.Linear(24, 12)
    model.fc_norm = nn.Linear(12, 24)
    with pytest.raises(UserError, match="none can be first") as caught:
        DiverseModel(model)
    assert "--last block" in caught.value.tip


def total(output: Any) -> Tensor:
    parts = (output.logits, output.first, output.last, output.patch_logits, *output.others)
    return torch.stack([part.square().mean() for part in parts]).sum()


def by_value() -> DiverseModel:
    return DiverseModel(small())


def by_hooks() -> DiverseModel:
    return DiverseModel(small(), first="patches", cosine_layers=(2,))


def hierarchical() -> DiverseModel:
    return DiverseModel(swin(), cosine_layers=(1, 3))


@pytest.mark.parametrize(
    ("build", "checkpointing"),
    [
        (by_value, True),
        pytest.param(hierarchical, True, marks=pytest.mark.slow),
        pytest.param(by_hooks, True, marks=pytest.mark.slow),
        pytest.param(hierarchical, False, marks=pytest.mark.slow),
    ],
)
def test_it_compiles_as_one_graph_with_the_same_gradients(build, checkpointing):
    wrapper = build().train()
    side = 64 if build is hierarchical else 32
    images = torch.randn(2, 3, side, side)
    expected = wrapper(images)
    total(expected).backward()
    gradients = {name: weight.grad.clone() for name, weight in wrapper.named_parameters()}
    wrapper.model.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    for network in (wrapper, torch.compile(wrapper, fullgraph=True, backend="aot_eager")):
        for _ in range(2):
            wrapper.zero_grad()
            output = network(images)
            total(output).backward()
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close({name: weight.grad for name, weight in wrapper.named_parameters()}, gradients)
        copy.deepcopy(wrapper)  # nothing of a forward pass stays behind
    torch._dynamo.reset()
