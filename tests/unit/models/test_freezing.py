import pytest
import timm
import torch
from torch import nn

from pdvit.errors import UserError
from pdvit.models.families import family_of, modules_at
from pdvit.models.tokens import DiverseModel
from pdvit.models.wrapper import freeze
from tests.unit.models.support import SMALL, SMALL_SWIN, SWIN, make


def frozen_up_to(model, count):
    """Return the names of the frozen weights of a timm model whose first blocks are frozen."""
    freeze(DiverseModel(model, patch_head=False), str(count))
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


PVT = {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pvt_v2_b0", PVT | {"depths": (1, 2, 1, 1)}),
        pytest.param(SWIN, SMALL_SWIN, marks=pytest.mark.slow),
        pytest.param("twins_svt_small", {"depths": (1, 1, 2, 2)}, marks=pytest.mark.slow),
    ],
)
def test_in_stages_all_before_a_block_is_frozen_and_nothing_after_it(name, arguments):
    model = timm.create_model(name, **arguments)
    blocks = modules_at(model, family_of(model).blocks)
    names = {id(weight): name for name, weight in model.named_parameters()}
    inside = [{names[id(weight)] for weight in block.parameters()} for block in blocks]
    found = [frozen_up_to(model, count) for count in range(len(blocks) + 1)]
    for count, frozen in enumerate(found):
        assert [block <= frozen for block in inside] == [number < count for number in range(len(blocks))]
        assert not any(name.startswith("head") for name in frozen)
    assert found[0] < found[1]


@pytest.mark.parametrize(
    ("name", "arguments", "count", "later"),
    [
        ("pvt_v2_b0", PVT | {"depths": (2, 2, 1, 2)}, 1, "stages.0.norm."),  # after block 2 of the first stage
        ("pvt_v2_b0", PVT | {"depths": (2, 2, 1, 2)}, 3, "stages.1.norm."),
        ("cait_xxs24_224", SMALL | {"depth": 4}, 4, "blocks_token_only."),  # after all 4
        ("pit_ti_224", {"img_size": 64}, 2, "transformers.1."),  # timm has no order of layers for it
    ],
)
def test_weights_after_a_trained_block_learn(name, arguments, count, later):
    model = timm.create_model(name, **arguments)
    found = {name for name, _ in model.named_parameters() if name.startswith(later)}
    assert found
    assert not found & frozen_up_to(model, count)


def test_frozen_parts_keep_their_weights_and_behave_as_in_evaluation():
    model = make("vit_tiny_patch16_224", depth=3, drop_path_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5)
    module, seen = DiverseModel(model), []
    module.model.patch_embed.norm = nn.BatchNorm1d(16)  # over patches, as if the stem had one
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hooks = [len(part._forward_pre_hooks) for part in module.modules()]
    freeze(module, "2")
    assert [len(part._forward_pre_hooks) for part in module.modules()] == hooks
    assert [block.training for block in module.model.blocks] == [False, False, True]
    module.model.blocks[1].register_forward_hook(lambda *values: seen.append(values[2]))
    images = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        module.train()
        module(images)
    assert torch.equal(*seen)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())  # statistics too


@pytest.mark.parametrize(("part", "what"), [("4", "only 3 blocks"), ("all", "not a part"), ("-1", "not a part")])
def test_an_unknown_part_is_refused(part, what):
    with pytest.raises(UserError, match=what):
        freeze(DiverseModel(make(depth=3)), part)
