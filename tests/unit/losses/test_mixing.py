import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses import mixing, mixing_loss
from pdvit.losses.mixing import chunked_mixing_loss

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 7), st.integers(0, 2**32))
few = settings(max_examples=30, deadline=None)


def make(images: int, count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, count, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(classes, (images, count), generator=generator)


def literal(logits: Tensor, targets: Tensor) -> float:
    """Mean over images of 1/n sum_i CE, patch by patch; targets are probabilities."""
    total, patches = 0.0, 0
    for image, labels in zip(logits.tolist(), targets.tolist(), strict=True):
        for scores, probabilities in zip(image, labels, strict=True):
            whole = sum(math.exp(score) for score in scores)
            terms = zip(scores, probabilities, strict=True)
            total -= sum(share * math.log(math.exp(score) / whole) for score, share in terms)
            patches += 1
    return total / patches


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_head_that_knows_nothing_gives_ln_c(classes):
    _, targets = make(2, 5, classes)
    assert mixing_loss(torch.zeros(2, 5, classes), targets).item() == pytest.approx(math.log(classes))


def literal_released(logits: Tensor, targets: Tensor) -> float:
    """Region by region: KL(target || softmax of the region's mean logits), by area; targets are probabilities."""
    total = 0.0
    for image, labels in zip(logits.tolist(), targets.tolist(), strict=True):
        for target in {tuple(label) for label in labels}:
            members = [i for i, label in enumerate(labels) if tuple(label) == target]
            pooled = [sum(image[i][c] for i in members) / len(members) for c in range(len(target))]
            whole = sum(math.exp(score) for score in pooled)
            kl = sum(
                t * (math.log(t) - math.log(math.exp(s) / whole)) for t, s in zip(target, pooled, strict=True) if t
            )
            total += kl * len(members) / len(labels)
    return total / len(logits)


@few
@given(shape=SHAPES, soft=st.booleans())
def test_equals_the_formula_patch_by_patch_and_region_by_region(shape, soft):
    logits, regions = make(*shape)
    # every image has up to C regions, of one class or with probabilities of their own
    probabilities = (
        make(1, shape[2], shape[2], shape[3] + 1)[0][0].softmax(-1) if soft else torch.eye(shape[2]).double()
    )
    targets = probabilities[regions]
    for labels in (targets,) if soft else (targets, regions):
        assert mixing_loss(logits, labels).item() == pytest.approx(literal(logits, targets))
        found = mixing_loss(logits, labels, "released").item()
        assert found == pytest.approx(literal_released(logits, targets), abs=1e-12)


@few
@given(shape=SHAPES)
def test_released_is_a_lower_bound_of_the_patches_by_jensen(shape):
    logits, targets = make(*shape)
    assert mixing_loss(logits, targets, "released").item() <= mixing_loss(logits, targets).item() + 1e-12


@few
@given(shape=SHAPES)
def test_released_equals_the_paper_form_where_the_patches_of_a_region_agree(shape):
    answers, targets = make(*shape)
    logits = answers[:, 0][:, None].expand_as(answers)
    found = mixing_loss(logits, targets, "released").item()
    assert found == pytest.approx(mixing_loss(logits, targets).item(), abs=1e-12)


def test_pooled_logits_are_the_head_of_the_pooled_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 6, 4, generator=generator)
    head = torch.nn.Linear(4, 3)
    targets = torch.tensor([[0, 0, 2, 2, 2, 0]])
    pooled = torch.stack([head(tokens[0, targets[0] == label].mean(0)) for label in (0, 2)])
    expected = F.cross_entropy(pooled, torch.tensor([0, 2]))  # both have half of the area
    torch.testing.assert_close(mixing_loss(head(tokens), targets, "released"), expected)


def test_the_answer_that_is_the_target_leaves_no_divergence():
    soft = make(2, 5, 4)[0].softmax(-1)
    assert mixing_loss(soft.log(), soft, "released").item() == pytest.approx(0, abs=1e-12)
    assert mixing_loss(soft.log(), soft).item() > 0.1  # the cross-entropy keeps the target's entropy


@pytest.mark.parametrize("variant", ["paper", "v1", "diverse-vit"])
def test_the_other_variants_are_the_mean_over_patches(variant):
    logits, targets = make(2, 6, 4)
    assert mixing_loss(logits, targets, variant) == mixing_loss(logits, targets)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("classes", [2, 7])
def test_a_multi_label_head_that_knows_nothing_gives_ln_2(variant, classes):
    labels = torch.randint(2, (2, 5, classes), generator=torch.Generator().manual_seed(0)).float()
    assert mixing_loss(torch.zeros_like(labels), labels, variant, multi_label=True).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_targets_out_of_range_are_refused(variant):
    logits, targets = make(2, 3, 4)
    targets[1, 2] = 4
    with pytest.raises(UserError, match="to 4 for 4 classes"):
        mixing_loss(logits, targets, variant)


def linear_head(images: int, count: int, width: int, classes: int, seed: int, soft: bool) -> list[Tensor]:
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
        patch.setattr(mixing, "CHUNK_ENTRIES", entries)
        *weights, targets = linear_head(*shape, soft)
        found, expected = (f(*weights, targets, smoothing) for f in (chunked_mixing_loss, dense))
        torch.testing.assert_close(found, expected)
        scale = 3.0  # a gradient that is not one comes from a weight of the term
        for one, other in zip(
            torch.autograd.grad(scale * found, weights), torch.autograd.grad(scale * expected, weights), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_without_a_bias_and_with_a_frozen_head():
    tokens, weight, _, targets = linear_head(2, 3, 4, 5, 0, soft=False)
    weight.requires_grad_(requires_grad=False)
    found, expected = (f(tokens, weight, None, targets, 0.0) for f in (chunked_mixing_loss, dense))
    torch.testing.assert_close(torch.autograd.grad(found, tokens), torch.autograd.grad(expected, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_sum_exact(device, dtype):
    """Products in half precision, all else in float32; small slopes of many patches do not vanish."""
    *parts, targets = (part.detach().to(device) for part in linear_head(4, 300, 8, 50, 0, soft=False))
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
    monkeypatch.setattr(mixing, "CHUNK_ENTRIES", 40)
    sizes = []
    linear = F.linear
    monkeypatch.setattr(mixing.F, "linear", lambda *args: sizes.append((out := linear(*args)).numel()) or out)
    tokens, weight, bias, targets = linear_head(5, 7, 3, 9, 0, soft=False)
    chunked_mixing_loss(tokens, weight, bias, targets)
    assert max(sizes) <= 40
    assert sum(sizes) == 5 * 7 * 9


def test_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(mixing, "CHUNK_ENTRIES", 40)
    *weights, targets = linear_head(2, 7, 3, 9, 0, soft=False)
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
def test_targets_out_of_range_of_a_head_are_refused(wrong):
    with pytest.raises(UserError, match=f"{wrong} for 5 classes|{wrong} to 0 for 5 classes"):
        chunked_mixing_loss(torch.zeros(1, 2, 4), torch.zeros(5, 4), None, torch.tensor([[0, wrong]]))


MEASURE_MEMORY = """
from pathlib import Path
import torch
from pdvit.losses.mixing import chunked_mixing_loss

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
