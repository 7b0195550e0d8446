import pytest
import torch
from torch import nn

from pdvit.config.schema import RunConfig
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.engine.parallel import parallelize
from pdvit.engine.protocol import StepOutput
from pdvit.errors import UserError

CPU = torch.device("cpu")


class Task:
    def __init__(self):
        self.module = nn.Linear(2, 1)

    def step(self, network, batch):
        loss = network(batch).square().mean()
        return StepOutput(loss, {"loss": loss.detach()})


def test_alone_the_step_is_that_of_the_task():
    task, batch = Task(), torch.ones(3, 2)
    step = parallelize(task, None, RunConfig(), SINGLE_PROCESS, CPU)
    assert torch.equal(step(batch).loss, task.step(task.module, batch).loss)
    assert list(step.parameters()) == list(task.module.parameters())


def test_fsdp_needs_several_processes():
    with pytest.raises(UserError, match="several processes"):
        parallelize(Task(), None, RunConfig(distribute="fsdp"), SINGLE_PROCESS, CPU)


def test_fsdp_and_compile_together_are_refused_with_the_reason():
    with pytest.raises(UserError, match="fetched within the step") as caught:
        parallelize(Task(), None, RunConfig(distribute="fsdp", compile=True), Ranks(0, 2), CPU)
    assert "--distribute ddp" in caught.value.tip
