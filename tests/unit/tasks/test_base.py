from contextlib import closing
from copy import deepcopy
from itertools import islice

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pdvit.config import build, resolve
from pdvit.data.loader import Batch
from pdvit.data.masks.folders import open_masks
from pdvit.data.opening import open_source
from pdvit.losses import TERMS, gram_loss
from pdvit.losses.terms import WeightSchedule
from pdvit.tasks import describe_summary
from pdvit.tasks.base import ImageTask
from pdvit.tasks.classification import ClassificationTask
from pdvit.tasks.segmentation import SegmentationTask
from tests.unit.data.batches import same

CPU = torch.device("cpu")
MODEL = {"depth": 1, "width": 16, "heads": 1, "patch_size": 8, "drop_path": 0.0}
ON = {"preset": "paper", "koleo": 0.5}


def task_of(**diversity) -> ClassificationTask:
    sections = {"model": MODEL, "data": {"img_size": 16}, "optim": {"epochs": "8st"}, "diversity": ON | diversity}
    config = resolve(build(("flags", sections)))
    return ClassificationTask(config, open_source(config.data), CPU)


def gram_task(**sections) -> ImageTask:
    """As of a run with initial weights, which these are; drop path and dropout act in training alone."""
    model = MODEL | {
        "name": "vit_tiny_patch16_224",
        "drop_path": 0.5,
        "init": "start",
        "args": {"pos_drop_rate": 0.1},
        "depth": 2,
    }
    diversity = {"preset": "paper", "gram": 2.0, "gram_schedule": "warmup:4st"}
    config = {"model": model, "data": {"img_size": 16}, "optim": {"epochs": "8st"}, "diversity": diversity}
    config = resolve(build(("flags", config | sections)))
    segments = config.segment.head is not None
    source = open_masks(config.data, config.segment) if segments else open_source(config.data)
    return (SegmentationTask if segments else ClassificationTask)(config, source, CPU)


SCENES = {"data": {"source": "scenes", "batch_size": 2, "workers": 0}, "segment": {"head": "upernet", "width": 8}}


def take(task: ClassificationTask, start: int, count: int) -> list[Batch]:
    with closing(task.batches(start)) as batches:
        return list(islice(batches, count))


LENGTHS = {"constant": {}, "warmup:0.1ep": {"warmup": 4}, "decay:50%": {"decay": 4}}
LENGTHS |= {"until:640im,warmup:5st": {"until": 20, "warmup": 5}}


@pytest.mark.parametrize(("text", "parts"), LENGTHS.items())
def test_lengths_become_steps(text, parts):
    schedules = dict(zip(TERMS, task_of(spectral_schedule=text).schedules, strict=True))
    assert schedules.pop("spectral") == WeightSchedule(8, **parts)
    assert set(schedules.values()) == {WeightSchedule(8)}


def test_a_batch_carries_the_factors_of_its_step_for_each_image():
    task = task_of(cosine_schedule="warmup:4st", koleo_schedule="until:6st")
    whole = take(task, 0, 8)
    for step, batch in enumerate(whole):
        factors = {"cosine": min(1, step / 4), "koleo": float(step < 6)}
        expected = torch.tensor([factors.get(term, 1) for term in TERMS])
        assert torch.equal(batch.weights, expected.expand(len(batch), -1))
        for part in [*batch.split(5), batch.repeat(3)]:
            assert torch.equal(part.weights, expected.expand(len(part), -1))
    (later,) = take(task, 5, 1)  # starting at a step equals getting there
    assert same([later], [whole[5]])
    assert all(batch.weights is None for batch in take(task_of(), 0, 2))


def test_the_loss_follows_the_factors_and_the_records_do_not():
    task, plain = task_of(contrastive_schedule="warmup:4st", mixing_schedule="until:1st"), task_of()
    plain.module.load_state_dict(task.module.state_dict())
    for step, (batch, other) in enumerate(zip(take(task, 0, 3), take(plain, 0, 3), strict=True)):
        (loss, metrics), (whole, parts) = task.step(task.module, batch), plain.step(plain.module, other)
        assert all(torch.equal(metrics[name], parts[name]) for name in metrics.keys() - {"loss"})
        missing = (1 - step / 4) * parts["contrastive"] + (step >= 1) * parts["mixing"]
        torch.testing.assert_close(loss, whole - missing)


@pytest.mark.parametrize("sections", [{}, SCENES], ids=["classification", "segmentation"])
def test_the_anchor_is_the_model_as_it_begins_on_the_images_of_the_step(sections):
    task = gram_task(**sections)
    begun, (batch,) = deepcopy(task.module).eval(), take(task, 1, 1)
    assert {name for name, _ in task.anchor.named_children()} == {task.module.inner}
    assert task.step(task.module.eval(), batch)[1]["gram"] < 1e-12  # equal relations on the same images
    optimizer = torch.optim.SGD(task.module.parameters(), 0.5)
    task.step(task.module.train(), batch)[0].backward()
    optimizer.step()
    assert not any(part.training for part in task.anchor.modules())
    with torch.no_grad():
        expected = gram_loss(task.module.eval()(batch.images).last, begun(batch.images).last)
        loss, found = task.step(task.module, batch)
    assert expected > 1e-6
    torch.testing.assert_close(found["gram"], expected)
    parts = {"class": 1, "cosine": 1, "contrastive": 1, "mixing": 1, "aux": 0.4, "gram": 2 / 4}
    total = sum(weight * found[name] for name, weight in parts.items() if name in found)
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("gram", [False, True], ids=["", "gram"])
def test_the_step_with_factors_compiles_once_and_in_one_piece(gram):
    task = gram_task() if gram else task_of(cosine_schedule="warmup:4st", spectral_schedule="decay:4st")
    task.module.eval()  # drop path would draw anew
    torch.compiler.reset()
    counter = CompileCounter()
    step = torch.compile(task.step, fullgraph=True, dynamic=False, backend=counter)
    for batch in take(task, 0, 3):
        torch.testing.assert_close(step(task.module, batch)[0], task.step(task.module, batch)[0])
    assert counter.frame_count <= 2  # class targets are probabilities if images are mixed, else indices


def test_a_number_that_json_can_not_hold_is_shown_as_nan():
    summary = {"split": "test", "accuracy": 0.5, "loss": None, "similarity_first": 0.25, "similarity_last": None}
    assert describe_summary(summary).startswith("test accuracy 50.0%, loss nan\nP of the patches: first 0.25, last nan")
