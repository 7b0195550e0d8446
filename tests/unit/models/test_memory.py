import pytest
import torch

from pdvit.errors import UserError
from pdvit.models import memory
from pdvit.models.memory import available, check_fits


def test_what_is_left_is_what_the_system_says(tmp_path, monkeypatch):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       8000 kB\nMemFree:         100 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", file)
    assert available() == 2048 * 1024
    file.write_text("MemTotal:       8000 kB\n")
    assert available() is None
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    assert available() is None


@pytest.mark.parametrize(("left", "fits"), [(4000, True), (3999, False), (None, True)])
def test_the_bytes_of_the_weights_have_to_be_left(monkeypatch, left, fits):
    monkeypatch.setattr(memory, "available", lambda: left)
    weights = [torch.empty(10, 50, device="meta"), torch.empty(1000, dtype=torch.float16, device="meta")]
    if fits:
        check_fits(weights, "big.pth")
    else:
        with pytest.raises(UserError, match="too big for memory"):
            check_fits(weights, "big.pth")
