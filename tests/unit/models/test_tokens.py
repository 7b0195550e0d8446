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
from pdvit.models.layers import find_layers, watch, watch_attention
from pdvit.models.tokens import DiverseModel
from tests.unit.models.support import SMALL_SWIN, SWIN, make, tokens_of

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LARGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


small = partial(make, "vit_tiny_patch16_224", depth=3)
swin = partial(make, SWIN, **SMALL_SWIN, num_classes=3, drop_path_rate=0.0)
# A plain model with its images, and one in stages.
plain_and_stages = pytest.mark.parametrize(
    ("build", "images"), [(small, IMAGES), (swin, LARGE)], ids=["plain", "stages"]
)


@pytest.mark.parametrize(
    ("build", "images", "options", "layers"),
    [
        *(
            (build, IMAGES, {"first": first}, [first, "norm"])
            for build in (small, partial(make, "cait_xxs24_224"))
            for first in ("embed", "patches")
        ),
        (small, IMAGES, {}, ["block 1", "norm"]),
        (small, IMAGES, {"last": "block"}, ["block 1", "block 3"]),
        (small, IMAGES, {"first": 2, "cosine_layers": (3, 1)}, ["block 2", "norm", "block 3", "block 1"]),
        (small, IMAGES, {"first": "2"}, ["block 2", "norm"]),
        (swin, LARGE, {"last": "block"}, ["block 4", "block 5"]),
        (partial(swin, depths=(1, 1, 1, 1)), LARGE, {}, ["block 4", "norm"]),
        (partial(swin, depths=(1, 1, 1, 1)), LARGE, {"last": "block", "compared": False}, ["block 4", "block 4"]),
        (swin, LARGE, {"first": 1, "compared": False}, ["block 1", "norm"]),
    ],
)
@torch.no_grad()
def test_layers_are_chosen_by_name_and_the_patch_head_reads_the_norm(build, images, options, layers):
    model = build()
    wrapper = DiverseModel(model, **options).eval()
    expected = tokens_of(model, images)
    block = next(part for name, part in model.named_modules() if name.endswith("blocks.0"))
    block.register_forward_pre_hook(lambda _, inputs: expected.update(embed=inputs[0][:, -16:].clone()))
    model.patch_embed.register_forward_hook(lambda _, __, output: expected.update(patches=output.clone()))
    output = wrapper(images)
    torch.testing.assert_close((output.first, output.last, *output.others), tuple(expected[name] for name in layers))
    torch.testing.assert_close(output.patch_logits, wrapper.patch_head(expected["norm"]))


@pytest.mark.parametrize(
    ("build", "options", "what"),
    [
        (small, {"first": "norm"}, "no first called .norm."),
        *((small, {"first": number}, f"no block {number}") for number in (0, 4)),
        (small, {"first": 3, "last": "block"}, "both block 3"),
        (small, {"last": "head"}, "no last called 'head'"),
        (small, {"cosine_layers": (1, 9)}, "no block 9"),
        *((swin, {"first": first}, "the shape of") for first in ("embed", "patches", 1)),  # another grid than last
        (partial(swin, depths=(1, 1, 1, 1)), {"last": "block"}, "first and last are both block 4"),
        (swin, {"first": "patches", "compared": False}, "the shape of patches"),
        (small, {"patch_head": "linear"}, "no patch head called"),
        (small, {"patch_head": nn.Linear(25, 3)}, "width 24"),
        (small, {"patch_head": nn.Linear(24, 4)}, "3 classes"),
        (partial(small, num_classes=0), {}, "no classes"),
        # The classifier does not read the tokens themselves.
        (partial(small, num_classes=0), {"patch_head": "class"}, "not one linear layer"),
        (partial(make, "deit_tiny_distilled_patch16_224"), {"patch_head": "class"}, "not one linear layer"),
        (partial(small, global_pool="avg"), {"patch_head": "class"}, "not one linear layer on tokens"),
        (partial(timm.create_model, "mobilevit_xxs"), {}, "can't read the patches"),
        (lambda: DiverseModel(small()), {}, "wrapper"),
        (lambda: nn.DataParallel(small()), {}, "wrapper"),
        (partial(small, patch_drop_rate=0.5), {}, "patch_drop_rate"),
        (
            lambda: NaFlexVit(NaFlexVitCfg(patch_size=16, embed_dim=24, depth=2, num_heads=2, patch_drop_rate=0.5)),
            *({}, "patch_drop_rate"),
        ),
    ],
)
def test_models_layers_and_heads_that_do_not_fit_are_refused(build, options, what):
    with pytest.raises(UserError, match=what):
        DiverseModel(build(), **options)


def test_a_patch_head_can_be_missing_or_a_module():
    wrapper = DiverseModel(small(num_classes=0), patch_head=False)
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


def total(output: Any) -> Tensor:
    parts = (output.logits, output.first, output.last, output.patch_logits, *output.others)
    return torch.stack([part.square().mean() for part in parts]).sum()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("build", "options", "images"),
    [(small, {"first": "patches", "cosine_layers": (2,)}, IMAGES), (swin, {"cosine_layers": (1, 3)}, LARGE)],
    ids=["plain", "stages"],
)
def test_checkpointed_and_compiled_as_one_graph_it_has_the_same_gradients(
    build, options, images, checkpointing, compiled
):
    wrapper = DiverseModel(build(), **options).train()
    expected = wrapper(images)
    total(expected).backward()
    gradients = {name: weight.grad.clone() for name, weight in wrapper.named_parameters()}
    wrapper.model.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    network = torch.compile(wrapper, fullgraph=True, backend="aot_eager") if compiled else wrapper
    for _ in range(2):
        wrapper.zero_grad()
        output = network(images)
        total(output).backward()
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close({name: weight.grad for name, weight in wrapper.named_parameters()}, gradients)
    twin = copy.deepcopy(wrapper)  # a forward pass leaves no activations behind
    wrapper.requires_grad_(False).apply(lambda part: [weight.zero_() for weight in part.parameters(recurse=False)])
    torch.testing.assert_close(twin(images), expected)  # a copy reads its own tokens
    torch._dynamo.reset()


def hooks_of(model: nn.Module) -> list[Any]:
    return [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_no_hook_outlives_a_measurement_or_an_error():
    model, during = small(), []

    def visit(layer, tokens):
        during.extend(hooks_of(model))
        raise ArithmeticError(layer)

    with pytest.raises(ArithmeticError, match="embed"), watch(find_layers(model)[1], visit):
        model(IMAGES)
    assert len(during) == 5
    assert not hooks_of(model)
    with watch(find_layers(model)[1], lambda *_: None):
        model(IMAGES)
    assert not hooks_of(model)


def attention_of(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}
    with torch.no_grad(), watch_attention(find_layers(model)[1], lambda layer, maps: found.update({layer: maps})):
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


def test_fused_attention_comes_back_also_after_an_error():
    model = small()
    attentions = [block.attn for block in model.blocks]
    attentions[1].fused_attn = False
    before = [attention.fused_attn for attention in attentions]

    def fail(layer, maps) -> None:
        assert not any(attention.fused_attn for attention in attentions)
        raise RuntimeError(layer)

    with pytest.raises(RuntimeError, match="block 1"), watch_attention(find_layers(model)[1], fail):
        model(IMAGES)
    assert [attention.fused_attn for attention in attentions] == before
    assert not hooks_of(model)


@pytest.mark.parametrize(
    "build",
    [
        swin,
        partial(make, "xcit_nano_12_p16_224"),
        partial(make, "cait_xxs24_224"),
        partial(MlpMixer, img_size=32, patch_size=8, num_blocks=1, embed_dim=24),
        partial(make, "vit_small_patch16_18x2_224"),  # several attentions side by side in a block
    ],
)
def test_other_attention_is_refused_with_the_reason(build):
    with pytest.raises(UserError, match=r"block 1.* works in windows"), watch_attention(find_layers(build())[1], print):
        pass
