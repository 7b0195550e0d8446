"""The peak memory of the forms that never hold everything at once, each measured in a process of its own."""

import subprocess
import sys

import pytest

SETUP = """
from pathlib import Path
import torch
from pdvit.losses.mixing import chunked_mixing_loss
from pdvit.similarity import patch_similarity

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024  # getrusage would begin with the parent's
"""
SIMILARITY = """
patch_similarity(torch.randn(1, 2048, 768))  # libraries and thread pools are loaded once
tokens = torch.randn(1, 16384, 768)
before = peak()
value = patch_similarity(tokens)
print(peak() - before)
assert abs(float(value) / (2 / (torch.pi * 768)) ** 0.5 - 1) < 0.01
"""
MIXING = """
head = torch.nn.Linear(768, 21841)
tokens = torch.randn(32, 196, 768, requires_grad=True)
targets = torch.randint(21841, (32, 196))
chunked_mixing_loss(torch.randn(1, 2, 768), head.weight[:9], head.bias[:9], targets[:1, :2] % 9)
before = peak()
chunked_mixing_loss(tokens, head.weight, head.bias, targets).backward()
print(peak() - before - 4 * head.weight.numel() / 2**20)  # beyond the gradient; all logits are 523, three times over
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "megabytes"), [(SIMILARITY, 256), (MIXING, 300)], ids=["16384 tokens", "21841 classes"]
)
def test_large_inputs_take_little_memory(code, megabytes):
    done = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= megabytes
