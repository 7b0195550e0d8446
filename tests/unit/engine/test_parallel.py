import pytest
import torch

from pdvit.config.schema import RunConfig
from pdvit.engine.distributed import Ranks
from pdvit.engine.update import parallelize
from pdvit.errors import UserError


@pytest.mark.parametrize(
    ("processes", "compiled", "message"), [(1, False, "several processes"), (2, True, "fetched within the step")]
)
def test_fsdp_needs_several_processes_and_does_not_compile(processes, compiled, message):
    run = RunConfig(distribute="fsdp", compile=compiled)
    with pytest.raises(UserError, match=message):
        parallelize(None, None, run, Ranks(0, processes), torch.device("cpu"))
