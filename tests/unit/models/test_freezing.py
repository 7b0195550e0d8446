import pytest
import timm
import torch
from torch import nn

from pdvit.config.schema import OptimConfig
from pdvit.engine.update import make_optimizer
from pdvit.errors import UserError
from pdvit.models.build import build_model
from pdvit.models.families import family_of, modules_at
from pdvit.models.tokens import DiverseModel
from pdvit.models.wrapper import freeze
from pdvit.models.wrapper import weights_up_to_block as _up_to_block

VIT = {"depth": 3, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 3}


def network(name="vit_tiny_patch16_224", patch_head=True, **more):
    torch.manual_seed(0)
    return DiverseModel(build_model(name, VIT | more), patch_head).train()


def trained(module):
    return {name.removeprefix("model.") for name, weight in module.named_parameters() if weight.requires_grad}


def step(module):
    """Run one backward pass; return which weights have a gradient."""
    output = module(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))
    (output.logits.square().sum() + output.patch_logits.square().sum()).backward()
    return {name.removeprefix("model.") for name, weight in module.named_parameters() if weight.grad is not None}


SLOW = pytest.mark.slow
STAGED = [
    "pvt_v2_b0",
    *(pytest.param(f"{name}_224", marks=SLOW) for name in ("swin_tiny_patch4_window7", "maxvit_tiny_tf")),
]


@pytest.mark.parametrize("name", [*STAGED, pytest.param("twins_svt_small", marks=SLOW)])
def test_in_stages_what_lies_before_a_block_is_frozen_and_nothing_behind(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = modules_at(model, family_of(model).blocks)
    names = {id(weight): name for name, weight in model.named_parameters()}
    for count in range(len(blocks) + 1):
        frozen = _up_to_block(model, count)
        inside = [{names[id(w)] for w in block.parameters()} <= frozen for block in blocks]
        assert inside == [number < count for number in range(len(blocks))]
        assert not any(name.startswith("head") for name in frozen)
    assert _up_to_block(model, 0) < _up_to_block(model, 1)


@pytest.mark.parametrize(
    ("name", "count", "behind"),
    [
        ("pvt_v2_b0", 1, "stages.0.norm."),  # behind block 2 of the first stage
        ("pvt_v2_b0", 3, "stages.1.norm."),
        ("cait_xxs24_224", 23, "blocks_token_only."),  # behind all 24
        pytest.param("cait_xxs24_224", 24, "blocks_token_only.", marks=SLOW),
        ("pit_ti_224", 2, "transformers.1."),  # timm has no order of layers for it
    ],
)
def test_what_comes_behind_a_trained_block_learns(name, count, behind):
    with torch.device("meta"):
        model = timm.create_model(name)
    found = {name for name, _ in model.named_parameters() if name.startswith(behind)}
    assert found
    assert not found & _up_to_block(model, count)


def test_finding_the_order_leaves_the_model_as_it_is():
    module = network(drop_path_rate=0.5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hooks = [len(part._forward_pre_hooks) for part in module.modules()]
    freeze(module, "1")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert [len(part._forward_pre_hooks) for part in module.modules()] == hooks


def test_frozen_parts_behave_as_in_evaluation():
    module = network(drop_path_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5)
    freeze(module, "2")
    modes = [block.training for block in module.model.blocks]
    assert modes == [False, False, True]
    assert not module.model.pos_drop.training
    images = torch.randn(2, 3, 32, 32)
    seen = []
    module.model.blocks[1].register_forward_hook(lambda *values: seen.append(values[2]))
    for _ in range(2):
        module.train()
        module(images)
    assert torch.equal(*seen)


def test_a_frozen_batch_norm_keeps_its_statistics():
    module = network()
    module.model.patch_embed.norm = nn.BatchNorm1d(16)  # over patches, as if the stem had one
    module.model.patch_embed.norm.weight.requires_grad_(False)
    freeze(module, "0")
    before = module.model.patch_embed.norm.running_mean.clone()
    module.train()
    module(torch.randn(4, 3, 32, 32))
    assert torch.equal(module.model.patch_embed.norm.running_mean, before)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("layer_decay", [None, 0.8])
def test_the_optimizer_has_no_frozen_weight(weight_decay, layer_decay):
    module = network()
    freeze(module, "1")
    optim = OptimConfig(lr=1e-3, weight_decay=weight_decay, layer_decay=layer_decay)
    optimizer = make_optimizer(module, optim)
    inside = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert inside == {id(weight) for weight in module.parameters() if weight.requires_grad}


@pytest.mark.parametrize(("part", "what"), [("4", "no 4 blocks"), ("all", "not a part"), ("-1", "not a part")])
def test_what_is_no_part_is_refused(part, what):
    with pytest.raises(UserError, match=what):
        freeze(network(), part)
