import copy

import pytest
import timm
import torch
from torch import nn

from pdvit.config.schema import OptimConfig
from pdvit.engine.update import Meter, make_optimizer, update
from pdvit.errors import UserError
from pdvit.models.tokens import DiverseModel

OPTIM = OptimConfig(lr=0.1, weight_decay=0.3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def loss_of(module, scale=1.0):
    return scale * module(torch.linspace(-1, 1, 20).view(5, 4)).square().sum()


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_an_update_is_backward_clip_and_step(clip):
    ours, theirs = network(), network()
    norm = update(loss_of(ours), ours, torch.optim.SGD(ours.parameters(), lr=0.1), clip)

    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    loss_of(theirs).backward()
    expected = torch.sqrt(sum(weight.grad.square().sum() for weight in theirs.parameters()))
    if clip is not None:
        nn.utils.clip_grad_norm_(theirs.parameters(), clip)
    optimizer.step()
    torch.testing.assert_close(norm, expected)
    assert not norm.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_clipping_limits_the_step():
    module = network()
    before = copy.deepcopy(module.state_dict())
    update(loss_of(module, 1e4), module, torch.optim.SGD(module.parameters(), lr=1.0), 0.5)
    moved = torch.cat([(module.state_dict()[name] - value).flatten() for name, value in before.items()])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)


def test_gradients_of_the_step_before_are_gone():
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    first = update(loss_of(module), module, optimizer, None)
    assert torch.equal(update(loss_of(module), module, optimizer, None), first)


def test_an_unknown_optimizer_names_the_closest():
    with pytest.raises(UserError, match="'adamv'") as caught:
        make_optimizer(network(), OptimConfig(opt="adamv", lr=0.1))
    assert "--opt" in caught.value.where
    assert "did you mean 'adam" in caught.value.tip


@pytest.mark.parametrize("opt", ["fusedadam", "bnbadamw8bit"])
def test_an_optimizer_that_needs_what_is_not_there_is_refused(monkeypatch, opt):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        make_optimizer(network(), OptimConfig(opt=opt, lr=0.1))
    assert "--opt" in caught.value.where


# By hand, from timm's VisionTransformer.no_weight_decay: weights of two or more axes, but neither position nor prefix.
def test_norms_biases_positions_and_prefix_tokens_are_not_decayed():
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 3}
    module = DiverseModel(timm.create_model("deit_tiny_distilled_patch16_224", **small))
    names = {id(weight): name for name, weight in module.named_parameters()}
    decayed = set()
    for group in make_optimizer(module, OPTIM).param_groups:
        assert group["weight_decay"] in (0.0, 0.3)
        decayed |= {names[id(weight)] for weight in group["params"] if group["weight_decay"]}
    assert decayed == {
        "model.patch_embed.proj.weight",
        "model.blocks.0.attn.qkv.weight",
        "model.blocks.0.attn.proj.weight",
        "model.blocks.0.mlp.fc1.weight",
        "model.blocks.0.mlp.fc2.weight",
        "model.head.weight",
        "model.head_dist.weight",
        "patch_head.weight",
    }


def test_a_meter_gives_means_and_starts_anew():
    meter = Meter()
    for loss, accuracy in ((1.0, 0.0), (2.0, 1.0), (6.0, 0.5)):
        meter.add({"loss": torch.tensor(loss), "accuracy": torch.tensor(accuracy)})
    assert meter.read() == {"loss": 3.0, "accuracy": 0.5}
    meter.add({"loss": torch.tensor(7.0)})
    assert meter.read() == {"loss": 7.0}
    assert meter.read() == {}


def test_a_meter_keeps_no_graph_and_enough_digits():
    meter = Meter()
    meter.add({"loss": torch.tensor(1e8, requires_grad=True) * 1})
    meter.add({"loss": torch.tensor(1.0)})
    assert not meter.sums["loss"].requires_grad
    assert meter.read() == {"loss": 50_000_000.5}


def test_a_meter_does_not_hide_what_is_not_finite():
    meter = Meter()
    meter.add({"loss": torch.tensor(float("nan"))})
    meter.add({"loss": torch.tensor(1.0)})
    assert meter.read()["loss"] != meter.read()
