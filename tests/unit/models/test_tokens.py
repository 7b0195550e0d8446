"""Which layers are first and last, patch heads, hooks and attention; test_families has every family."""

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.layers import attentions_of, measure_layers, places_of, watch, watch_attention
from pdvit.models.tokens import DiverseModel
from tests.unit.models.support import SMALL, SMALL_SWIN, SWIN

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LARGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def small(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL | {"depth": 3} | arguments).eval()


def swin(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(SWIN, **SMALL_SWIN | {"num_classes": 3, "drop_path_rate": 0.0} | arguments).eval()


def layers_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {layer.name: tokens for layer, tokens in measure_layers(model, images, torch.clone).items()}


plain_and_stages = pytest.mark.parametrize(
    ("build", "images"), [(small, IMAGES), (swin, LARGE)], ids=["plain", "stages"]
)


@pytest.mark.parametrize("first", ["embed", "patches"])
@pytest.mark.parametrize(("model", "prefix"), [("vit_tiny_patch16_224", 1), ("cait_xxs24_224", 0)])
@torch.no_grad()
def test_first_can_be_before_the_blocks(first, model, prefix):
    model, seen = small(model), []
    plain, wrapper = DiverseModel(model)(IMAGES), DiverseModel(model, first=first).eval()
    if first == "embed":
        model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, prefix:]))
    else:
        model.patch_embed.register_forward_hook(lambda _, __, output: seen.append(output.reshape(3, 16, 24)))
    output = wrapper(IMAGES)
    assert torch.equal(output.first, seen[0])
    assert torch.equal(output.logits, model(IMAGES))
    torch.testing.assert_close(output.last, plain.last)
    assert not torch.equal(output.first, plain.first)


@plain_and_stages
def test_last_can_be_before_the_norm_and_the_patch_head_stays_after_it(build, images):
    model = build()
    found = layers_of(model, images)
    wrapper = DiverseModel(model, last="block").eval()
    output = wrapper(images)
    torch.testing.assert_close(output.last, found[[name for name in found if name.startswith("block")][-1]])
    torch.testing.assert_close(output.patch_logits, wrapper.patch_head(found["norm"]))


@pytest.mark.parametrize("first", [2, "2"])
def test_first_can_be_any_block_and_the_cosine_term_can_read_more_layers(first):
    model = small()
    found = layers_of(model, IMAGES)
    output = DiverseModel(model, first=first, cosine_layers=(3, 1))(IMAGES)
    torch.testing.assert_close((output.first, *output.others), tuple(found[f"block {at}"] for at in (2, 3, 1)))
    assert DiverseModel(model)(IMAGES).others == ()


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


@pytest.mark.parametrize("first", ["embed", "patches", 1])
def test_first_must_have_the_grid_of_last(first):
    with pytest.raises(UserError, match="the shape of"):
        DiverseModel(swin(), first=first)


def test_in_a_last_stage_of_one_block_only_the_norm_separates_first_and_last():
    model = swin(depths=(1, 1, 1, 1))
    output = DiverseModel(model)(LARGE)
    assert not torch.equal(output.first, output.last)
    with pytest.raises(UserError, match="none can be first"):
        DiverseModel(model, last="block")


def test_a_patch_head_can_be_missing_or_a_module():
    model = small(num_classes=0)
    with pytest.raises(UserError, match="no classes"):
        DiverseModel(model)
    wrapper = DiverseModel(model, patch_head=False)
    assert wrapper(IMAGES).patch_logits is None
    assert all(name.startswith("model.") for name in wrapper.state_dict())
    head = nn.Sequential(nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 3))
    output = DiverseModel(small(), patch_head=head)(IMAGES)
    torch.testing.assert_close(output.patch_logits, head(output.last))


@plain_and_stages
def test_the_models_own_classifier_can_be_the_patch_head(build, images):
    model = build()
    wrapper = DiverseModel(model, patch_head="class").eval()
    output = wrapper(images)
    classifier = model.get_classifier()
    torch.testing.assert_close(output.patch_logits, classifier(output.last))
    assert all(name.startswith("model.") for name in wrapper.state_dict())
    output.patch_logits.sum().backward()
    assert classifier.weight.grad.any()


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (partial(small, num_classes=0), "not one linear layer"),
        (partial(small, "deit_tiny_distilled_patch16_224"), "not one linear layer"),
        (partial(small, global_pool="avg"), "fc_norm"),
        (partial(timm.create_model, "convnext_tiny", depths=(1, 1, 1, 2), dims=(8, 8, 16, 16)), "head.norm"),
    ],
)
def test_a_classifier_that_does_not_read_the_tokens_is_refused_as_patch_head(build, why):
    with pytest.raises(UserError, match=why):
        DiverseModel(build(), patch_head="class")


@pytest.mark.parametrize(
    ("name", "sizes", "why"),
    [
        ("resnet18", {"layers": (1,) * 4}, "no tokens"),
        ("mobilevit_xxs", {}, "between convolutions"),
        ("qwen3_vit_88m_enc", {"depth": 1}, "language model"),
        ("convit_tiny", {"depth": 1}, "half-way"),
        ("crossvit_9_240", {}, "side by side"),
        ("nest_tiny", {}, "windows"),
    ],
)
def test_models_that_are_not_in_the_table_are_refused_with_a_reason(name, sizes, why):
    with torch.device("meta"):
        model = timm.create_model(name, **sizes)
    with pytest.raises(UserError, match=why):
        DiverseModel(model)


@pytest.mark.parametrize(
    ("wrap", "attribute"),
    [(DiverseModel, "model"), (nn.DataParallel, "module"), (lambda model: torch.compile(model), "_orig_mod")],
)
def test_a_wrapper_is_refused_with_the_attribute_of_the_model_inside(wrap, attribute):
    with pytest.raises(UserError) as caught:
        DiverseModel(wrap(small()))
    assert caught.value.tip == f"pass the bare model, which is its .{attribute}"


@pytest.mark.parametrize(
    "build",
    [
        small,
        partial(small, "eva02_tiny_patch14_224"),
        partial(timm.create_model, "hiera_tiny_224", stages=(1, 1, 1, 2), embed_dim=8, img_size=(64, 64)),
        lambda **more: NaFlexVit(NaFlexVitCfg(patch_size=16, embed_dim=24, depth=2, num_heads=2, **more)),
    ],
)
def test_dropping_patches_is_refused(build):
    with pytest.raises(UserError, match="patch_drop_rate"):
        DiverseModel(build(patch_drop_rate=0.5))


def total(output: Any) -> Tensor:
    parts = (output.logits, output.first, output.last, output.patch_logits, *output.others)
    return torch.stack([part.square().mean() for part in parts]).sum()


BY_VALUE = (partial(small, depth=2), {}, IMAGES)
BY_HOOKS = (small, {"first": "patches", "cosine_layers": (2,)}, IMAGES)
STAGES = (swin, {"cosine_layers": (1, 3)}, LARGE)


@pytest.mark.parametrize(
    ("case", "checkpointing"),
    [
        pytest.param(BY_VALUE, True, id="by value"),
        *(pytest.param(case, True, marks=pytest.mark.slow) for case in (STAGES, BY_HOOKS)),
        pytest.param(STAGES, False, marks=pytest.mark.slow),
    ],
)
def test_it_compiles_as_one_graph_with_the_same_gradients(case, checkpointing):
    build, options, images = case
    wrapper = DiverseModel(build(), **options).train()
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
        copy.deepcopy(wrapper)  # a forward pass leaves no activations behind
    torch._dynamo.reset()


def hooks_of(model: nn.Module) -> list[Any]:
    return [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_no_hook_outlives_a_measurement_or_an_error():
    model, during = small(), []

    def visit(layer, tokens):
        during.extend(hooks_of(model))
        raise ArithmeticError(layer.name)

    with pytest.raises(ArithmeticError, match="embed"), watch(places_of(model), visit):
        model(IMAGES)
    assert len(during) == 5
    assert not hooks_of(model)
    assert measure_layers(model, IMAGES, lambda tokens: float(tokens.sum()))
    assert not hooks_of(model)


def attention_of(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}
    with torch.no_grad(), watch_attention(model, lambda layer, maps: found.update({layer.name: maps})):
        return found, model(IMAGES)


def test_attention_equals_the_softmax_of_queries_and_keys():
    model, entering = small(reg_tokens=2), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    found, _ = attention_of(model)
    assert list(found) == ["block 1", "block 2", "block 3"]
    for block, tokens, maps in zip(model.blocks, entering, found.values(), strict=True):
        query, key, _ = block.attn.qkv(tokens).chunk(3, -1)
        for head in range(2):
            q, k = (part[..., 12 * head : 12 * head + 12] for part in (query, key))
            torch.testing.assert_close(maps[:, head], (q @ k.mT / 12**0.5).softmax(-1), atol=1e-6, rtol=1e-5)


PLAIN = ["vit_relpos_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"]


@pytest.mark.parametrize("name", [*PLAIN, "deit_tiny_distilled_patch16_224"])
def test_attention_of_plain_models_is_of_all_tokens_and_leaves_the_logits(name):
    model = small(name)
    found, logits = attention_of(model)
    torch.testing.assert_close(logits, model(IMAGES), atol=1e-5, rtol=1e-4)
    for maps in found.values():
        assert maps.shape[1] == 2
        assert maps.shape[2] == maps.shape[3] >= 16
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))


def test_fused_attention_comes_back_also_after_an_error():
    model = small()
    attentions = [block.attn for block in model.blocks]
    attentions[1].fused_attn = False
    before = [attention.fused_attn for attention in attentions]

    def fail(layer, maps) -> None:
        assert not any(attention.fused_attn for attention in attentions)
        raise RuntimeError(layer.name)

    with pytest.raises(RuntimeError, match="block 1"), watch_attention(model, fail):
        model(IMAGES)
    assert [attention.fused_attn for attention in attentions] == before
    assert not hooks_of(model)


@pytest.mark.parametrize(
    "build",
    [
        swin,
        partial(small, "xcit_nano_12_p16_224"),
        partial(small, "cait_xxs24_224"),
        partial(MlpMixer, img_size=32, patch_size=8, num_blocks=1, embed_dim=24),
        partial(small, "vit_small_patch16_18x2_224"),  # several attentions side by side in a block
    ],
)
def test_other_attention_is_refused_with_the_reason(build):
    with pytest.raises(UserError, match=r"block 1.* works in windows"):
        attentions_of(build())
