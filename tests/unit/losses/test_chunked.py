import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses import chunked
from pdvit.losses.chunked import chunked_mixing_loss

few = settings(max_examples=40, deadline=None)


def make(images: int, count: int, width: int, classes: int, seed: int, soft: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((images, count, width), (classes, width), (classes,))
    )
    targets = torch.randint(classes, (images, count), generator=generator)
    if soft:
        targets = torch.rand(images, count, classes, generator=generator, dtype=torch.float64)
    return [tokens, weight, bias, targets]


def dense(tokens: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float) -> Tensor:
    """Torch's own cross-entropy of all the logits at once."""
    logits = F.linear(tokens, weight, bias).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(0, 1), label_smoothing=smoothing)


@few
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3, st.integers(2, 7), st.integers(0, 2**32)),
    soft=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3]),
    entries=st.sampled_from([1, 10, 30, 1000]),
)
def test_value_and_gradients_are_those_of_all_logits_at_once(shape, soft, smoothing, entries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "ENTRIES", entries)
        *weights, targets = make(*shape, soft)
        found, expected = (f(*weights, targets, smoothing) for f in (chunked_mixing_loss, dense))
        torch.testing.assert_close(found, expected)
        scale = 3.0  # a gradient that is not one comes from a weight of the term
        for one, other in zip(
            torch.autograd.grad(scale * found, weights), torch.autograd.grad(scale * expected, weights), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_without_a_bias_and_with_a_frozen_head():
    tokens, weight, _, targets = make(2, 3, 4, 5, 0, soft=False)
    weight.requires_grad_(requires_grad=False)
    found, expected = (f(tokens, weight, None, targets, 0.0) for f in (chunked_mixing_loss, dense))
    torch.testing.assert_close(torch.autograd.grad(found, tokens), torch.autograd.grad(expected, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_sum_exact(device, dtype):
    """Products in half precision, all else in float32; small slopes of many patches do not vanish."""
    *parts, targets = (part.detach().to(device) for part in make(4, 300, 8, 50, 0, soft=False))
    weights = [weight.float().requires_grad_() for weight in parts]
    with torch.autocast(device, dtype):
        found = chunked_mixing_loss(*weights, targets)
    expected = dense(*weights, targets, 0.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_the_gradient_of_the_head_fits_float16_where_its_sum_would_not(device):
    """Many patches of one class: their slopes add up to more than 65,504 before they are divided by their number."""
    tokens, head = torch.full((64, 400, 4), 10.0, device=device), torch.zeros(10, 4, device=device, requires_grad=True)
    targets = torch.zeros(64, 400, dtype=torch.long, device=device)
    with torch.autocast(device, torch.float16):
        loss = chunked_mixing_loss(tokens, head, None, targets)
    (found,) = torch.autograd.grad(loss, head)
    expected = torch.full((10, 4), 1.0, device=device)
    expected[0] = -9.0
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


def test_no_product_has_more_entries_than_allowed(monkeypatch):
    monkeypatch.setattr(chunked, "ENTRIES", 40)
    sizes = []
    linear = F.linear
    monkeypatch.setattr(chunked.F, "linear", lambda *args: sizes.append((out := linear(*args)).numel()) or out)
    tokens, weight, bias, targets = make(5, 7, 3, 9, 0, soft=False)
    chunked_mixing_loss(tokens, weight, bias, targets)
    assert max(sizes) <= 40
    assert sum(sizes) == 5 * 7 * 9


def test_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(chunked, "ENTRIES", 40)
    *weights, targets = make(2, 7, 3, 9, 0, soft=False)
    compiled = torch.compile(chunked_mixing_loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*weights, targets), dense(*weights, targets, 0.0)
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("tokens", "weight", "targets", "named"),
    [
        ((2, 3, 4), (5, 6), (2, 3), "do not belong together"),
        ((3, 4), (5, 4), (3,), "do not belong together"),
        ((2, 3, 4), (5, 4), (2, 4), "for logits of shape"),
        ((2, 3, 4), (5, 4), (2, 3, 6), "for logits of shape"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(tokens, weight, targets, named):
    with pytest.raises(UserError, match=named):
        chunked_mixing_loss(torch.zeros(tokens), torch.zeros(weight), None, torch.zeros(targets, dtype=torch.long))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_targets_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"{wrong} for 5 classes|{wrong} to 0 for 5 classes"):
        chunked_mixing_loss(torch.zeros(1, 2, 4), torch.zeros(5, 4), None, torch.tensor([[0, wrong]]))


MEASURE_MEMORY = """
from pathlib import Path
import torch
from pdvit.losses.chunked import chunked_mixing_loss

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024  # getrusage would begin with the parent's

head = torch.nn.Linear(768, 21841)
tokens = torch.randn(32, 196, 768, requires_grad=True)
targets = torch.randint(21841, (32, 196))
chunked_mixing_loss(torch.randn(1, 2, 768), head.weight[:9], head.bias[:9], targets[:1, :2] % 9)  # libraries are loaded
before = peak()
chunked_mixing_loss(tokens, head.weight, head.bias, targets).backward()
print(peak() - before - 4 * head.weight.numel() / 2**20)
"""


@pytest.mark.slow
def test_a_head_of_21841_classes_takes_at_most_300_megabytes_beyond_its_gradient():
    done = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 300  # all the logits at once are 523, three times over
