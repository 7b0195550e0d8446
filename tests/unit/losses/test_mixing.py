import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses import mixing, mixing_loss
from pdvit.losses.mixing import chunked_mixing_loss


def make(images: int, count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, count, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(classes, (images, count), generator=generator)


def by_regions(logits: Tensor, targets: Tensor) -> float:
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


@pytest.mark.parametrize("shape", [(3, 6, 2), (1, 1, 4), (2, 5, 7)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_is_torchs_cross_entropy_of_all_patches_or_equals_the_formula_region_by_region(shape, soft):
    logits, regions = make(*shape)
    # Every image has up to C regions, of one class or with probabilities of their own.
    probabilities = make(1, shape[2], shape[2], 1)[0][0].softmax(-1) if soft else torch.eye(shape[2]).double()
    targets = probabilities[regions]
    for labels in (targets,) if soft else (targets, regions):
        for variant in ("paper", "v1", "diverse-vit"):
            expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
            torch.testing.assert_close(mixing_loss(logits, labels, variant), expected)
        found = mixing_loss(logits, labels, "released").item()
        assert found == pytest.approx(by_regions(logits, targets), abs=1e-12)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("classes", [2, 7])
def test_a_uniform_prediction_gives_ln_c_and_ln_2_for_several_labels(variant, classes):
    _, targets = make(2, 5, classes)
    assert mixing_loss(torch.zeros(2, 5, classes), targets, variant).item() == pytest.approx(math.log(classes))
    labels = torch.randint(2, (2, 5, classes), generator=torch.Generator().manual_seed(0)).float()
    assert mixing_loss(torch.zeros_like(labels), labels, variant, multi_label=True).item() == pytest.approx(math.log(2))


def linear_head(images: int, count: int, width: int, classes: int, soft: bool = False) -> list[Tensor]:
    """Return tokens, weight and bias of a head, and targets."""
    generator = torch.Generator().manual_seed(0)
    tokens, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((images, count, width), (classes, width), (classes,))
    )
    targets = torch.randint(classes, (images, count), generator=generator)
    if soft:
        targets = torch.rand(images, count, classes, generator=generator, dtype=torch.float64)
    return [tokens, weight, bias, targets]


def dense(tokens: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Torch's own cross-entropy of all the logits at once."""
    logits = F.linear(tokens, weight, bias).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(0, 1), label_smoothing=smoothing)


@pytest.mark.parametrize("entries", [1, 10, 30, 1000])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_value_and_gradients_are_those_of_all_logits_at_once(monkeypatch, soft, entries):
    monkeypatch.setattr(mixing, "BLOCK_ENTRIES", entries)
    for shape, smoothing in product([(3, 5, 2, 7), (5, 1, 4, 2), (1, 4, 1, 3)], [0.0, 0.3]):
        *weights, targets = linear_head(*shape, soft)
        found, expected = (f(*weights, targets, smoothing) for f in (chunked_mixing_loss, dense))
        torch.testing.assert_close(found, expected)
        # a gradient that is not one comes from a weight of the term
        slopes = [torch.autograd.grad(3.0 * loss, weights) for loss in (found, expected)]
        torch.testing.assert_close(*slopes)


def test_without_a_bias_and_with_a_frozen_head():
    tokens, weight, _, targets = linear_head(2, 3, 4, 5)
    weight.requires_grad_(requires_grad=False)
    found, expected = (f(tokens, weight, None, targets) for f in (chunked_mixing_loss, dense))
    torch.testing.assert_close(torch.autograd.grad(found, tokens), torch.autograd.grad(expected, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_sum_exact(device, dtype):
    """Products in half precision, all else in float32; small slopes of many patches do not vanish."""
    *parts, targets = (part.detach().to(device) for part in linear_head(4, 300, 8, 50))
    weights = [weight.float().requires_grad_() for weight in parts]
    with torch.autocast(device, dtype):
        found = chunked_mixing_loss(*weights, targets)
    expected = dense(*weights, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


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


def test_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(mixing, "BLOCK_ENTRIES", 40)
    *weights, targets = linear_head(2, 7, 3, 9)
    compiled = torch.compile(chunked_mixing_loss, fullgraph=True, backend="aot_eager")
    losses = compiled(*weights, targets), dense(*weights, targets)
    torch.testing.assert_close(*(torch.autograd.grad(loss, weights) for loss in losses))


BAD = {"for logits of shape": [[0, 1, 2]], "from -1 to 0 for 5 classes": [[-1, 0]], "to 5 for 5 classes": [[0, 5]]}


@pytest.mark.parametrize(("message", "targets"), BAD.items())
def test_targets_that_do_not_fit_are_refused(targets, message):
    forms = [partial(chunked_mixing_loss, torch.zeros(1, 2, 4), torch.zeros(5, 4), None)]
    forms += [partial(mixing_loss, torch.zeros(1, 2, 5), variant=variant) for variant in ("paper", "released")]
    for loss in forms:
        with pytest.raises(UserError, match=message):
            loss(patch_targets=torch.tensor(targets))
