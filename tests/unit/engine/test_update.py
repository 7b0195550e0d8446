import copy
import math
from dataclasses import dataclass, replace

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from pdvit.config.schema import Config, OptimConfig, RunConfig
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.engine.state import MetricAccumulator, TrainState
from pdvit.engine.update import Step, Updater, make_optimizer, parallelize
from pdvit.models.tokens import DiverseModel
from tests.errors import refused

OPTIM = OptimConfig(lr=0.1, weight_decay=0.3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@dataclass(frozen=True)
class Points:
    points: torch.Tensor

    def __len__(self):
        return len(self.points)

    def split(self, size):
        return [Points(part) for part in self.points.split(size)]


class Task:
    """Squares of a small network's output, times a scale."""

    batch_size = 5

    def __init__(self, scale=1.0, device="cpu"):
        self.module, self.scale = network().to(device), scale

    def step(self, network, batch):
        loss = self.scale * network(batch.points).square().mean()
        return loss, {"loss": loss.detach()}


def batch_on(device):
    return Points(torch.linspace(-1, 1, 20, device=device).view(5, 4))


BATCH = batch_on("cpu")


def updater_of(task, optimizer, clip=None, precision="fp32", compile=False):
    config = replace(Config(), optim=OptimConfig(clip_grad=clip), run=RunConfig(precision=precision, compile=compile))
    device = next(task.module.parameters()).device
    scaler = GradScaler(device.type, enabled=precision == "fp16")
    state = TrainState(task.module, optimizer, scaler, None, device, SINGLE_PROCESS, {}, {})
    return Updater(task, Step(task, compile), state, config)


def sgd(task, lr=0.1):
    return torch.optim.SGD(task.module.parameters(), lr=lr)


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_an_update_is_backward_clip_and_step(clip):
    ours, theirs = Task(), Task()
    metrics, skipped = updater_of(ours, sgd(ours), clip)(BATCH, 1)

    optimizer = sgd(theirs)
    theirs.step(theirs.module, BATCH)[0].backward()
    expected = torch.sqrt(sum(weight.grad.square().sum() for weight in theirs.module.parameters()))
    if clip is not None:
        nn.utils.clip_grad_norm_(theirs.module.parameters(), clip)
    optimizer.step()
    torch.testing.assert_close(metrics["grad_norm"], expected)
    assert not metrics["grad_norm"].requires_grad
    assert not skipped
    ours, theirs = ours.module.parameters(), theirs.module.parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("opt", ["adamw", "sgd", "momentum", "lamb", "muon"])
@pytest.mark.parametrize("bad", [1, 2])
def test_an_update_that_is_not_finite_changes_nothing(device, opt, bad):
    """Neither weights nor the optimizer's state, be it the first update or a later one."""
    ours, theirs, batch = Task(device=device), Task(device=device), batch_on(device)
    updaters = [updater_of(task, make_optimizer(task.module, OptimConfig(opt=opt, lr=0.1))) for task in (ours, theirs)]
    for number in (1, 2, 3):
        if number == bad:
            broken = Points(torch.full((5, 4), float("nan"), device=device))
            metrics, skipped = updaters[0](broken, number)
            assert skipped
            assert metrics["loss"].isnan()
        _, skipped = updaters[0](batch, number)
        assert not skipped
        updaters[1](batch, number)
    weights = zip(ours.module.parameters(), theirs.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_an_infinite_gradient_of_a_finite_loss_is_seen():
    class Steep(Task):
        def step(self, network, batch):  # the root has an infinite slope at 0
            loss = network(batch.points).sub(network(batch.points)).square().sum().sqrt()
            return loss, {"loss": loss.detach()}

    task = Steep()
    metrics, skipped = updater_of(task, sgd(task))(BATCH, 1)
    assert metrics["loss"].isfinite()
    assert skipped


def test_a_loss_scale_that_overflows_is_halved_and_the_step_skipped(device):
    task = Task(1e4, device)
    updater = updater_of(task, make_optimizer(task.module, OptimConfig(opt="adamw", lr=0.1)), precision="fp16")
    before, scales = copy.deepcopy(task.module.state_dict()), []
    for step in range(20):
        scales.append(updater.state.scaler.get_scale())
        if not updater(batch_on(device), step + 1)[1]:
            break
        assert all(torch.equal(before[name], value) for name, value in task.module.state_dict().items())
    assert len(scales) > 1
    assert scales == [65536.0 / 2**number for number in range(len(scales))]


@pytest.mark.parametrize(
    ("opt", "tip"), [("adamv", "did you mean 'adam"), ("fusedadam", "adamw"), ("bnbadamw8bit", "adamw")]
)
def test_an_optimizer_that_is_unknown_or_can_not_run_is_an_error(monkeypatch, opt, tip):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(where="--opt", tip=tip):
        make_optimizer(network(), OptimConfig(opt=opt, lr=0.1))


@pytest.mark.parametrize(
    ("processes", "compiled", "message"), [(1, False, "several processes"), (2, True, "fetched within the step")]
)
def test_fsdp_needs_several_processes_and_does_not_compile(processes, compiled, message):
    run = RunConfig(distribute="fsdp", compile=compiled)
    with refused(message):
        parallelize(None, None, run, Ranks(0, processes), torch.device("cpu"))


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


def test_the_accumulator_leaves_skipped_steps_out_and_counts_them():
    metrics = MetricAccumulator()

    def read_after(*losses):
        for loss in losses:
            metrics.add({"loss": torch.tensor(loss)}, torch.tensor(not math.isfinite(loss)))
        return metrics.read(SINGLE_PROCESS)

    nan = float("nan")
    assert read_after(1.0, 2.0, 6.0) == ({"loss": 3.0}, 0, 0)
    assert read_after(1.0, nan, 3.0, float("inf"), nan) == ({"loss": 2.0}, 3, 2)
    means, skipped, in_a_row = read_after(nan)
    assert math.isnan(means["loss"])
    assert (skipped, in_a_row) == (1, 3)  # the row goes on over a reading
    assert read_after(1.0) == ({"loss": 1.0}, 0, 0)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_heads_have_a_learning_rate_of_their_own(layer_decay):
    """Against the first step of Nesterov's momentum by hand (1.9 times rate and gradient) under timm's schedule."""
    torch.manual_seed(0)
    model = DiverseModel(timm.create_model("test_vit", num_classes=2, img_size=32))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optim = OptimConfig(opt="sgd", lr=0.1, weight_decay=0.0, layer_decay=layer_decay, head_lr=0.3)
    optimizer = make_optimizer(model, optim)
    CosineLRScheduler(optimizer, t_initial=10).step(0)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    moved = {name: (before[name] - weight).mean().item() for name, weight in model.named_parameters()}
    for name in ("model.head.weight", "model.head.bias", "patch_head.weight"):
        assert moved[name] == pytest.approx(1.9 * 0.3, rel=1e-5)
    last = len(model.inside.blocks) - 1
    assert moved[f"model.blocks.{last}.mlp.fc1.weight"] == pytest.approx(1.9 * 0.1 * (layer_decay or 1), rel=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_of_convolutions_are_tried_in_training_alone(deterministic, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)  # the caller's choice, which stays
    task, found = Task(), []
    task.module.register_forward_hook(lambda *_: found.append(torch.backends.cudnn.benchmark))
    updater = updater_of(task, sgd(task))
    updater.config = replace(updater.config, run=RunConfig(deterministic=deterministic))
    updater.backward(BATCH)
    task.scale = "of an error"
    with pytest.raises(TypeError):
        updater.backward(BATCH)
    assert (found, torch.backends.cudnn.benchmark) == ([not deterministic] * 2, deterministic)


def test_fsdp_shards_blocks_and_not_other_children_of_a_sequential():
    """A stage of Swin is such a child: it holds blocks."""
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 1), embed_dim=24, num_heads=(1, 2))
    task = Task()
    task.module = DiverseModel(model)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # collectives that do nothing
    try:
        parallelize(task, None, RunConfig(distribute="fsdp"), Ranks(0, 2), torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    sharded = [module for module in task.module.modules() if isinstance(module, FSDPModule)]
    assert sharded == [task.module, *(block for stage in model.layers for block in stage.blocks)]
