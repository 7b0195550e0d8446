from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn

from pdvit.errors import UserError
from pdvit.models.layers import layers_of, measure_layers, watch_layers
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


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("resnet18", {}), ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 12})],
)
def test_a_network_without_a_grid_of_patches_is_refused(name, arguments):
    with pytest.raises(UserError, match="can't read the patches"):
        DiverseModel(timm.create_model(name, **arguments))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_dropping_patches_is_refused(name):
    with pytest.raises(UserError, match="patch_drop_rate"):
        DiverseModel(timm.create_model(name, **SMALL, patch_drop_rate=0.5))


def test_a_patch_head_without_classes_is_refused():
    model = make(CASES[0], num_classes=0)
    with pytest.raises(UserError, match="no classes"):
        DiverseModel(model)
    assert DiverseModel(model, patch_head=False)(pictures()).last.shape == (2, PATCHES, WIDTH)


@all_models
def test_layers_go_from_the_embedding_to_the_norm(case):
    names = [layer.name for layer in layers_of(make(case))]
    assert names == ["embed", "block 1", "block 2"] + (["norm"] if case.last == "norm" else [])
    assert [layer.depth for layer in layers_of(make(case))] == list(range(len(names)))


@all_models
def test_watched_layers_are_what_the_modules_put_out(case):
    model, images = make(case), pictures()
    entering = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    found = measure_layers(model, images, lambda tokens: tokens.clone())
    handle.remove()
    outputs = {"block 1": "blocks.0", "block 2": "blocks.1", "norm": "norm"}
    expected = {"embed": entering[0][:, case.prefix :]}
    for layer in layers_of(model)[1:]:
        expected[layer.name] = spy(model, outputs[layer.name], images)[:, case.prefix :]
    assert [layer.name for layer in found] == list(expected)
    for layer, tokens in found.items():
        assert torch.equal(tokens, expected[layer.name]), layer.name
        assert not tokens.requires_grad


def hooks_of(model):
    return [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_no_hook_outlives_an_exception():
    model = make(CASES[0])

    during = []

    def visit(layer, tokens):
        during.extend(hooks_of(model))
        raise ArithmeticError(layer.name)

    with pytest.raises(ArithmeticError, match="embed"), watch_layers(model, visit):
        model(pictures())
    assert len(during) == 4
    assert not hooks_of(model)


def test_no_hook_outlives_a_measurement():
    model = make(CASES[0])
    assert measure_layers(model, pictures(), lambda tokens: float(tokens.sum()))
    assert not hooks_of(model)
