import pytest
import torch

from pdvit.config.schema import RunConfig
from pdvit.engine.device import choose_device, is_out_of_memory, set_up, visible_gpus
from pdvit.errors import UserError


@pytest.mark.parametrize(
    ("variable", "count", "found"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("2,5", 2, ["2", "5"]),
        ("GPU-a,MIG-b", 2, ["GPU-a", "MIG-b"]),
        ("3,-1,4", 1, ["3"]),  # CUDA reads up to the first that is not there
        ("", 0, []),
    ],
)
def test_gpus_are_named_as_a_process_of_their_own_has_to_see_them(monkeypatch, variable, count, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == found


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (MemoryError(), False),
    ],
)
def test_only_a_full_device_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(("name", "what"), [("cpu:x", "no device 'cpu:x'"), ("meta", "not run on"), ("", "not run on")])
def test_a_device_that_can_not_be_used_is_an_error(name, what):
    with pytest.raises(UserError, match=what):
        choose_device(name)


@pytest.mark.parametrize(
    ("device", "asked", "found"),
    [("cpu", "auto", "fp32"), ("cpu", "bf16", "bf16"), ("cuda:0", "auto", "fp32"), ("cuda:1", "auto", "bf16")],
)
def test_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch, device, asked, found):
    """Of two GPUs, a Turing and an Ampere, the run's own is asked, not the current one."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: ((7, 5), (8, 0))[device.index])
    assert set_up(torch.device(device), RunConfig(precision=asked)).precision == found
    with pytest.raises(UserError, match="cuda:0 has no bfloat16"):
        set_up(torch.device("cuda:0"), RunConfig(precision="bf16"))
