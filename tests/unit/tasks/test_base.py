from contextlib import closing
from itertools import islice

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pdvit.config import build, resolve
from pdvit.data.loader import Batch
from pdvit.data.opening import open_source
from pdvit.losses import TERMS
from pdvit.losses.terms import WeightSchedule
from pdvit.tasks import describe_summary
from pdvit.tasks.classification import ClassificationTask

CPU = torch.device("cpu")
MODEL = {"depth": 1, "width": 16, "heads": 1, "patch_size": 8, "drop_path": 0.0}
ON = {"preset": "paper", "koleo": 0.5}


def task_of(**diversity) -> ClassificationTask:
    sections = {"model": MODEL, "data": {"img_size": 16}, "optim": {"epochs": "8st"}, "diversity": ON | diversity}
    config = resolve(build(("flags", sections)))
    return ClassificationTask(config, open_source(config.data), CPU)


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
    assert all(torch.equal(later.tensors()[name], value) for name, value in whole[5].tensors().items())
    assert all(batch.weights is None for batch in take(task_of(), 0, 2))


def test_the_loss_follows_the_factors_and_the_records_do_not():
    task, plain = task_of(contrastive_schedule="warmup:4st", mixing_schedule="until:1st"), task_of()
    plain.module.load_state_dict(task.module.state_dict())
    for step, (batch, same) in enumerate(zip(take(task, 0, 3), take(plain, 0, 3), strict=True)):
        found, whole = task.step(task.module, batch), plain.step(plain.module, same)
        named = found.metrics.keys() - {"loss"}
        assert all(torch.equal(found.metrics[name], whole.metrics[name]) for name in named)
        missing = (1 - step / 4) * whole.metrics["contrastive"] + (step >= 1) * whole.metrics["mixing"]
        torch.testing.assert_close(found.loss, whole.loss - missing)


def test_the_step_with_factors_compiles_once_and_in_one_piece():
    task = task_of(cosine_schedule="warmup:4st", spectral_schedule="decay:4st")
    torch.compiler.reset()
    counter = CompileCounter()
    step = torch.compile(task.step, fullgraph=True, dynamic=False, backend=counter)
    for batch in take(task, 0, 3):
        torch.testing.assert_close(step(task.module, batch).loss, task.step(task.module, batch).loss)
    assert counter.frame_count <= 2  # class targets are probabilities if images are mixed, else indices


def test_a_number_that_json_can_not_hold_is_shown_as_nan():
    summary = {"split": "test", "accuracy": 0.5, "loss": None, "similarity_first": 0.25, "similarity_last": None}
    assert describe_summary(summary).startswith("test accuracy 50.0%, loss nan; P of the patches: first 0.25, last nan")
