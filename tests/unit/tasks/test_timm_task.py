import functools
import random

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import Tensor, nn

from pdvit import Objective
from pdvit.errors import UserError
from pdvit.tasks.timm_task import DiversityTask

CLASSES = 5
make_model = functools.partial(
    timm.create_model, "vit_tiny_patch16_224", img_size=48, depth=2, embed_dim=16, num_heads=2, num_classes=CLASSES
)


@pytest.fixture
def batch(device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    return torch.randn(4, 3, 48, 48).to(device), torch.tensor([0, 3, 4, 1], device=device)


@pytest.fixture
def make_task(device):
    """Return a function that makes a task with a model on the device, as timm's script does."""

    def make(criterion: nn.Module | None = None, **options: object) -> DiversityTask:
        torch.manual_seed(0)
        criterion = criterion or LabelSmoothingCrossEntropy(0.1)
        where = torch.device(device)
        return DiversityTask(make_model().to(where), criterion, device=where, verbose=False, **options)

    return make


def test_the_loss_is_the_class_loss_that_was_given_plus_the_terms(make_task, batch):
    found = make_task(objective=Objective(cosine=2, contrastive=3, mixing=4))(*batch)
    terms = 2 * found["cosine_loss"] + 3 * found["contrastive_loss"] + 4 * found["mixing_loss"]
    torch.testing.assert_close(found["loss"], found["class_loss"] + terms)
    assert found["output"].shape == (4, CLASSES)


def test_without_mixing_images_and_targets_are_taken_as_they_are(make_task, batch):
    images, classes = batch
    task = make_task(criterion=nn.CrossEntropyLoss(label_smoothing=0.1), objective=Objective(mixing=0)).eval()
    found, logits = task(images, classes), task.get_eval_model()(images)
    torch.testing.assert_close(found["output"], logits)
    soft = torch.rand(4, CLASSES, device=images.device).softmax(1)  # timm's own mixing is welcome then
    for targets in (classes, soft):
        expected = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
        torch.testing.assert_close(task(images, targets)["class_loss"], expected)


def test_the_class_loss_of_a_mixed_image_is_that_of_its_classes_by_area(make_task, batch, monkeypatch):
    task, seen = make_task(cutmix=1.0, prob=1.0), []
    model = task.trainable_module
    monkeypatch.setattr(model, "forward", lambda *args: seen.append(args) or type(model).forward(model, *args))
    found = task(*batch)
    patch_targets = seen[0][1]
    soft = nn.functional.one_hot(patch_targets, CLASSES).float().mean(1)
    assert ((soft > 0).sum(1) == 2).all()
    expected = nn.functional.cross_entropy(found["output"], soft, label_smoothing=0.1)
    torch.testing.assert_close(found["class_loss"], expected)


def test_labels_and_terms_that_the_task_can_not_use_are_refused(make_task, batch):
    with pytest.raises(UserError, match="one class per image"):
        make_task(objective=Objective(multi_label=True))
    with pytest.raises(UserError, match="no anchor"):
        make_task(objective=Objective(gram=1.0))
    with pytest.raises(UserError, match="mixed already"):
        make_task()(batch[0], torch.rand(4, CLASSES).to(batch[0]))


def test_checkpoints_hold_the_bare_model_and_the_patch_head_apart(make_task, batch):
    task = make_task()
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1)
    task(*batch)["loss"].backward()
    optimizer.step()
    task.update_ema(step=10)
    states = task.get_checkpoint_state(), task.get_checkpoint_state(ema=True)
    make_model().load_state_dict(states[0]["state_dict"])
    make_model().load_state_dict(states[1]["state_dict_ema"])
    fresh = make_task()
    fresh.load_checkpoint_state(states[0]["state_dict"], states[0]["task_state"])
    for name, value in task.get_trainable_module().state_dict().items():
        assert torch.equal(fresh.get_trainable_module().state_dict()[name], value)
    heads = states[1]["task_state_ema"], fresh.get_task_state()
    assert not torch.equal(*(state["patch_head"]["weight"] for state in heads))


def test_it_learns_in_half_precision_with_the_scaler_of_timm(make_task, batch, device):
    """As timm's script does with --amp --amp-dtype float16: steps that overflow are left out, and halve the scale."""
    task, scaler = make_task(prob=0.0), NativeScaler(device=device)
    module, losses = task.get_trainable_module(), []
    optimizer = create_optimizer_v2(module, opt="adamw", lr=1e-2, weight_decay=0.1, layer_decay=0.9)
    for _ in range(40):
        with torch.autocast(device, torch.float16):
            loss = task(*batch)["loss"]
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=module.parameters())
        losses.append(loss.item())
    assert all(weight.grad is not None and weight.isfinite().all() for weight in module.parameters())
    assert losses[-1] < losses[0] - 1


def test_the_compiled_task_gives_the_same_loss(make_task, batch):
    found = []
    for compiled in (False, True):
        task = make_task()
        if compiled:
            task.compile(backend="eager", fullgraph=True)
        random.seed(1)
        found.append(task(*batch)["loss"])
        assert task.get_eval_model()(batch[0]).shape == (4, CLASSES)
        assert "patch_head.weight" not in task.get_checkpoint_state()["state_dict"]
        assert type(task.create_evaluator()).__name__ == "ClassificationEvaluator"
    torch.testing.assert_close(*found)
